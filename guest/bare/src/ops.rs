//! The operations, one function each, as [`guest_abi::param::op`] describes them.

use guest_abi::{
    param::{Step, op, who},
    pattern::{self, Pages, WORDS, WORK_WORD},
    port::{ANNOUNCE, CONSOLE, PAUSE, READY},
};

use crate::{
    clock, cpu,
    error::Bad,
    fork,
    interpreter::Machine,
    port,
    work::{Page, WorkArea},
};

/// How many result words an operation writes; `None` if there is no such operation.
pub(crate) fn results(operation: u32) -> Option<usize> {
    Some(match operation {
        op::FILL | op::CHECK | op::PEEK | op::COUNT => 1,
        op::RATE | op::WORK => 2,
        op::CLOCK => 3,
        op::SPIN => 4,
        op::FORK => fork::RESULTS,
        op::DIRTY_STRIDE
        | op::DIRTY_RANDOM
        | op::EXIT
        | op::POKE
        | op::PRINT
        | op::PAUSE
        | op::READY => 0,
        _ => return None,
    })
}

/// Runs one step. Its result words exist.
pub(crate) fn execute(machine: &mut Machine, step: &Step) -> Result<(), Bad> {
    match step.op {
        op::FILL => fill(machine, step),
        op::DIRTY_STRIDE => dirty_stride(machine, step),
        op::DIRTY_RANDOM => dirty_random(machine, step),
        op::CHECK => check(machine, step),
        op::FORK => fork(machine, step),
        op::SPIN => {
            spin(machine, step);
            Ok(())
        }
        op::RATE => rate(machine, step),
        op::WORK => work(machine, step),
        op::EXIT => port::exit(u32::from(step.args[0].to_le_bytes()[0])),
        op::PEEK => peek(machine, step),
        op::POKE => poke(machine, step),
        op::CLOCK => read_clock(machine, step),
        op::PRINT => print(step),
        op::PAUSE => at_most_u32('a', step.args[0]).map(|us| port::write(PAUSE, us)),
        op::COUNT => count(machine, step),
        op::READY => {
            port::write(READY, 0);
            Ok(())
        }
        unknown => Err(Bad::Op(unknown)),
    }
}

/// `value` as an index or a length, if it is at most `most`.
pub(crate) fn at_most(name: char, value: u64, most: usize) -> Result<usize, Bad> {
    match usize::try_from(value) {
        Ok(small) if small <= most => Ok(small),
        _ => Err(Bad::Argument { name, value, most: most as u64 }),
    }
}

fn at_most_u32(name: char, value: u64) -> Result<u32, Bad> {
    u32::try_from(value).map_err(|_| Bad::Argument { name, value, most: u32::MAX.into() })
}

fn fill(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let area = WorkArea::new(&machine.header)?;
    let [seed, ..] = step.args;
    for number in 0..area.pages() {
        let page = area.page(number);
        for word in 0..WORDS {
            page.set(word, pattern::base(seed, number, word));
        }
        page.set(WORK_WORD, 0);
        dirty(page, number, 0);
    }
    machine.set_result(step, 0, area.pages());
    Ok(())
}

fn dirty(page: Page, number: u64, generation: u64) {
    let mark = pattern::mark(number, generation);
    page.set(0, mark);
    page.set(WORDS - 1, mark);
}

fn dirty_stride(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let area = WorkArea::new(&machine.header)?;
    let [count, generation, first, stride] = step.args;
    if count == 0 {
        return Ok(());
    }
    let pages = area.pages();
    if first >= pages {
        return Err(Bad::Argument { name: 'c', value: first, most: pages.saturating_sub(1) });
    }
    let stride = stride % pages;
    let mut number = first;
    for _ in 0..count {
        dirty(area.page(number), number, generation);
        // A subtraction instead of a remainder: the stride is below the number of pages.
        number += stride;
        if number >= pages {
            number -= pages;
        }
    }
    Ok(())
}

/// The random pages that `seed` picks among the first `among` of `area` (all if 0), `count` of
/// them.
fn random_pages(
    area: WorkArea,
    count: u64,
    seed: u64,
    among: u64,
) -> Result<impl Iterator<Item = u64>, Bad> {
    let pages = area.pages();
    if among > pages || (pages == 0 && count > 0) {
        return Err(Bad::Argument { name: 'd', value: among, most: pages });
    }
    let mut picked = Pages::new(seed, if among == 0 { pages } else { among });
    Ok((0..count).map_while(move |_| picked.next()))
}

fn dirty_random(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let area = WorkArea::new(&machine.header)?;
    let [count, generation, seed, among] = step.args;
    for number in random_pages(area, count, seed, among)? {
        dirty(area.page(number), number, generation);
    }
    Ok(())
}

fn check(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let area = WorkArea::new(&machine.header)?;
    let [count, _, seed, _] = step.args;
    let sum = if count == 0 {
        sum_pages(area, 0..area.pages())
    } else {
        sum_pages(area, random_pages(area, count, seed, 0)?)
    };
    machine.set_result(step, 0, sum);
    Ok(())
}

/// Sum of the checksums of pages.
fn sum_pages(area: WorkArea, mut numbers: impl Iterator<Item = u64>) -> u64 {
    let mut total: u64 = 0;
    loop {
        // Four pages side by side: the checksum of one is a chain of multiplications, each of
        // which waits for the one before.
        let four = [(); 4].map(|()| numbers.next().map(|number| area.page(number)));
        if let [Some(a), Some(b), Some(c), Some(d)] = four {
            let mut sums = [0; 4];
            for word in 0..WORDS {
                for (sum, page) in sums.iter_mut().zip([a, b, c, d]) {
                    *sum = pattern::sum_word(*sum, page.get(word));
                }
            }
            total = sums.into_iter().fold(total, u64::wrapping_add);
        } else {
            return four.into_iter().flatten().fold(total, |total, page| {
                total.wrapping_add(pattern::page_sum((0..WORDS).map(|word| page.get(word))))
            });
        }
    }
}

fn fork(machine: &mut Machine, step: &Step) -> Result<(), Bad> {
    let [children, announce_us, wait_ticks, _] = step.args;
    let children = at_most_u32('a', children)?;
    let announce_us = at_most_u32('b', announce_us)?;
    if announce_us != 0 {
        port::write(ANNOUNCE, announce_us);
        cpu::wait(wait_ticks);
    }
    let outcome = fork::fork(children);
    for (index, value) in outcome.results().into_iter().enumerate() {
        machine.set_result(step, index, value);
    }
    // A fork that failed made nobody: the roles of the one before it stay.
    if outcome.succeeded() {
        machine.set_role(if outcome.is_child() { who::CHILD } else { who::PARENT });
    }
    Ok(())
}

fn spin(machine: &Machine, step: &Step) {
    let [ticks, ..] = step.args;
    let start = cpu::tsc();
    let (mut last, mut largest, mut smallest, mut readings) = (start, 0, u64::MAX, 1);
    loop {
        let now = cpu::tsc();
        let gap = now.wrapping_sub(last);
        largest = largest.max(gap);
        smallest = smallest.min(gap);
        readings += 1;
        last = now;
        if now.wrapping_sub(start) >= ticks {
            break;
        }
    }
    for (index, value) in [largest, smallest, readings, last].into_iter().enumerate() {
        machine.set_result(step, index, value);
    }
}

fn rate(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let area = WorkArea::new(&machine.header)?;
    let [ticks, generation, seed, pages_per_second] = step.args;
    let tsc_khz = machine.header.tsc_khz;
    let ticks_per_second = tsc_khz.saturating_mul(1000);
    if pages_per_second == 0 || ticks_per_second == 0 {
        return Err(Bad::Rate { pages_per_second, tsc_khz });
    }
    // The n-th page is due at n / rate seconds, to the tick and without a division per page: the
    // remainder of the interval is carried along.
    let (interval, remainder) =
        (ticks_per_second / pages_per_second, ticks_per_second % pages_per_second);
    let (mut due, mut carry) = (0_u64, 0);
    let (mut dirtied, mut behind, mut now) = (0_u64, 0, 0);
    let start = cpu::tsc();
    for number in random_pages(area, u64::MAX, seed, 0)? {
        let late_from = due.max(now);
        while now < due && now < ticks {
            cpu::relax();
            now = cpu::tsc().wrapping_sub(start);
        }
        if now >= ticks {
            break;
        }
        dirty(area.page(number), number, generation);
        dirtied += 1;
        now = cpu::tsc().wrapping_sub(start);
        behind += now.saturating_sub(late_from);
        due += interval;
        carry += remainder;
        if carry >= pages_per_second {
            carry -= pages_per_second;
            due += 1;
        }
    }
    machine.set_result(step, 0, dirtied);
    machine.set_result(step, 1, behind);
    Ok(())
}

fn work(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let area = WorkArea::new(&machine.header)?;
    let [first, count, passes, _] = step.args;
    let end = first.checked_add(count).filter(|&end| end <= area.pages()).ok_or(Bad::Argument {
        name: 'b',
        value: count,
        most: area.pages().saturating_sub(first),
    })?;
    let (mut first_pass, mut all) = (0, 0);
    let start = cpu::tsc();
    for pass in 0..passes {
        for number in first..end {
            let page = area.page(number);
            page.set(WORK_WORD, page.get(WORK_WORD).wrapping_add(1));
        }
        all = cpu::tsc().wrapping_sub(start);
        if pass == 0 {
            first_pass = all;
        }
    }
    machine.set_result(step, 0, first_pass);
    machine.set_result(step, 1, all);
    Ok(())
}

fn peek(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let word = WorkArea::new(&machine.header)?.peek(step.args[0])?;
    machine.set_result(step, 0, word);
    Ok(())
}

fn poke(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let [address, value, ..] = step.args;
    WorkArea::new(&machine.header)?.word(address)?.set(value);
    Ok(())
}

fn read_clock(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let before = cpu::tsc();
    let ns = clock::now_ns(machine.vcpu)?;
    let after = cpu::tsc();
    for (index, value) in [before, ns, after].into_iter().enumerate() {
        machine.set_result(step, index, value);
    }
    Ok(())
}

fn print(step: &Step) -> Result<(), Bad> {
    let [text, len, ..] = step.args;
    let len = at_most('b', len, 8)?;
    port::write_bytes(CONSOLE, &text.to_le_bytes()[..len]);
    Ok(())
}

fn count(machine: &Machine, step: &Step) -> Result<(), Bad> {
    let [ticks, address, ..] = step.args;
    let word = WorkArea::new(&machine.header)?.word(address)?;
    let start = cpu::tsc();
    loop {
        let value = word.get().wrapping_add(1);
        word.set(value);
        if cpu::tsc().wrapping_sub(start) >= ticks {
            machine.set_result(step, 0, value);
            return Ok(());
        }
    }
}
