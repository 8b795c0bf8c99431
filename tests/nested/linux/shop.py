"""A shop in SQLite and a tree of modules, both warm; then the machine is forked ten ways from here.

What is found are lines `@name value`: of the parent on its output, of a child on its console, after
which the child ends with code 10 + its number.
"""

import asyncio
import collections
import csv
import datetime
import decimal
import email.message
import email.parser
import fractions
import hashlib
import http.client
import io
import json
import os
import secrets
import sqlite3
import ssl
import statistics
import subprocess
import sys
import time
import unittest
import uuid
import xml.etree.ElementTree as tree

ROWS, TAKEN, CHILDREN = 3000, 1000, 10
ZERO = str(uuid.UUID(int=0))


def amount(number):
    return number * number * 7919 % 10007


class Session:
    """The command-line tool with an open database, at the other end of two pipes."""

    def __init__(self):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(["sqlite3", ":memory:"], stdin=pipe, stdout=pipe, text=True)
        self.ask("create table t (x integer); insert into t values (1000); begin; select 0;")

    def ask(self, sql):
        self.process.stdin.write(sql + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def opened():
    shop = sqlite3.connect("/tmp/shop.db", isolation_level=None)
    shop.execute("create table sale (id integer primary key, city text, cents integer)")
    cities = ("Bonn", "Graz", "Lyon", "Oslo", "Turin", "York", "Zug")
    shop.execute("begin")
    sales = ((n, cities[n % len(cities)], amount(n)) for n in range(1, ROWS + 1))
    shop.executemany("insert into sale values (?, ?, ?)", sales)
    shop.execute("commit")
    # Open across the fork: a cursor half way, and a transaction.
    cursor = shop.execute("select id, cents from sale order by id")
    taken = cursor.fetchmany(TAKEN)
    shop.execute("begin immediate")
    shop.execute("insert into sale values (1000000, 'Rome', 1000000)")
    return shop, cursor, taken


def one(shop, sql, *values):
    return shop.execute(sql, values).fetchone()[0]


def rest(shop, cursor):
    return sum(cents for _, cents in cursor)


def rolled_back(shop, cursor):
    cursor.close()
    shop.execute("rollback")
    return one(shop, "select sum(cents) from sale")


def committed(shop, cursor):
    cursor.close()
    shop.execute("commit")
    other = sqlite3.connect("/tmp/shop.db")
    return one(other, "select sum(cents) from sale")


def deleted(shop, cursor):
    shop.execute("delete from sale where id % 3 = 0")
    return one(shop, "select count(*) from sale")


def inserted(shop, cursor):
    more = ((2000000 + n, "Faro", n) for n in range(1, 501))
    shop.executemany("insert into sale values (?, ?, ?)", more)
    return one(shop, "select sum(cents) from sale where city = 'Faro'")


def in_decimals(shop, cursor):
    euros = (decimal.Decimal(cents) / 100 for (cents,) in shop.execute("select cents from sale"))
    return sum(euros)


def as_json(shop, cursor):
    rows = shop.execute("select id, cents from sale where id <= 4 order by id").fetchall()
    return json.dumps(json.loads(json.dumps(dict(rows))), separators=(",", ":"))


def as_xml(shop, cursor):
    sales = tree.Element("sales")
    for number, cents in shop.execute("select id, cents from sale where city = 'Oslo'"):
        tree.SubElement(sales, "sale", id=str(number)).text = str(cents)
    return sum(int(sale.text) for sale in tree.fromstring(tree.tostring(sales)))


def in_tasks(shop, cursor):
    async def of(city):
        await asyncio.sleep(0)
        return one(shop, "select max(cents) from sale where city = ?", city)

    async def all_of_them():
        return sum(await asyncio.gather(*map(of, ("Bonn", "Lyon", "York"))))

    return asyncio.run(all_of_them())


def by_mail(shop, cursor):
    mail = email.message.EmailMessage()
    mail["Subject"] = "totals"
    totals = shop.execute("select city, count(*) from sale group by city order by city")
    mail.set_content("\n".join(f"{city} {count}" for city, count in totals))
    read = email.parser.Parser().parsestr(mail.as_string())
    return ",".join(read.get_payload().split())


WORK = (rest, rolled_back, committed, deleted, inserted, in_decimals, as_json, as_xml, in_tasks, by_mail)


def fork():
    file = os.open("/uk/libukp/fork", os.O_RDWR)
    os.write(file, b"1")
    child = os.read(file, 100).decode().strip()
    os.close(file)
    return child


def random_numbers():
    """OpenSSL keeps a state of its own, which has to be told that this is another machine."""
    stale = ssl.RAND_bytes(16).hex()
    ssl.RAND_add(os.urandom(32), 32.0)
    with open("/proc/sys/kernel/random/uuid") as file:
        kernel = file.read().strip()
    return (os.urandom(16).hex(), secrets.token_hex(16), kernel, str(uuid.uuid4()),
            ssl.RAND_bytes(16).hex(), stale)


def say(to, **found):
    for name, value in found.items():
        print(f"@{name} {value}", file=to)
    to.flush()


def child_of(number, shop, cursor, session, forked):
    with open("/dev/console", "w") as console:
        found = WORK[number](shop, cursor)
        kept = session.ask(f"insert into t values ({number}); select sum(x), count(*) from t;")
        check = one(shop, "pragma integrity_check")
        say(console, found=found, session=kept, check=check, taken=len(forked),
            random=" ".join(random_numbers()))
    os.execv("/.uk/ukp", ["ukp", "exit", str(10 + number)])


def main():
    begin = time.monotonic()
    shop, cursor, taken = opened()
    session = Session()
    ssl.RAND_bytes(16)
    say(sys.stdout, modules=len(sys.modules), warm=f"{time.monotonic() - begin:.2f}")
    children = []
    for number in range(CHILDREN):
        child = fork()
        if child == ZERO:
            child_of(number, shop, cursor, session, taken)
        children.append(child)
    say(sys.stdout, children=" ".join(children), forks=f"{time.monotonic() - begin:.2f}")
    codes = []
    for child in children:
        with open(f"/uk/libukp/vm/{child}/wait", "r+b", buffering=0) as wait:
            wait.write(b"1")
            codes.append(wait.read(100).decode().strip())
    kept = session.ask("select sum(x), count(*) from t;")
    left = rest(shop, cursor)
    before = one(shop, "select sum(cents) from sale")
    shop.execute("rollback")
    after = one(shop, "select sum(cents) from sale")
    say(sys.stdout, codes=" ".join(codes), session=kept, left=left, before=before, after=after,
        rows=one(shop, "select count(*) from sale"), check=one(shop, "pragma integrity_check"),
        random=" ".join(random_numbers()))


main()
