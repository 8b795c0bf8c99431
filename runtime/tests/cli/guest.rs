//! Guests of our own, assembled here, as `guest/bare/ABI.md` tells.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use libtest_mimic::Failed;
use serde_json::Value;

use super::tools::{Folder, Owner, holds, same, start, until};

/// Says hello, forks `CHILDREN`, exits with 10; child n pauses, says so, and exits with 20 + n.
const FORKS: &str = r#"
        .globl  _start
_start: lea     hello(%rip), %rsi
        mov     $hello_end - hello, %ecx
        mov     $0xd0c, %edx
        rep outsb
        xor     %eax, %eax
        mov     $0xd18, %edx
        out     %eax, %dx
        mov     $CHILDREN, %eax
        mov     $0xd00, %edx
        out     %eax, %dx
        lea     answer(%rip), %rdi
        mov     $24, %ecx
        rep insl
        mov     $99, %eax
        cmpl    $0, answer(%rip)
        jne     exit
        mov     answer+4(%rip), %ebx
        mov     $10, %eax
        test    %ebx, %ebx
        jz      exit
        mov     $PAUSE_US, %eax
        mov     $0xd1c, %edx
        out     %eax, %dx
        lea     child(%rip), %rsi
        mov     $child_end - child, %ecx
        mov     $0xd0c, %edx
        rep outsb
        lea     20(%rbx), %eax
exit:   mov     $0xd08, %edx
        out     %eax, %dx
        jmp     exit
hello:  .ascii  "hello\n"
hello_end:
child:  .ascii  "a child\n"
child_end:
        .bss
        .balign 128
answer: .skip   96
        .section .note.GNU-stack, "", @progbits
"#;

const SPINS: &str = r#"
        .globl  _start
_start: pause
        jmp     _start
        .section .note.GNU-stack, "", @progbits
"#;

const CRASHES: &str = r#"
        .globl  _start
_start: ud2
        .section .note.GNU-stack, "", @progbits
"#;

/// Assembles and links. `cc` is there: rustc links with it.
pub fn guest(folder: &Folder, source: &str, more: &[&str]) -> Result<String, Failed> {
    let input: PathBuf = folder.0.join("guest.s");
    std::fs::write(&input, source)?;
    let output = folder.0.join("guest.elf").display().to_string();
    let made = Command::new("cc")
        .args(["-nostdlib", "-Wl,--build-id=none", "-o", &output])
        .args(more)
        .arg(input)
        .output()?;
    holds(made.status.success(), &made)?;
    Ok(output)
}

pub const STATIC: [&str; 3] = ["-static", "-no-pie", "-Wl,-Ttext-segment=0x200000"];

fn forking(folder: &Folder, children: u32, pause_us: u32) -> Result<String, Failed> {
    let numbers = [("CHILDREN", children), ("PAUSE_US", pause_us)];
    let fill = |text: String, (name, number): &(&str, u32)| text.replace(name, &number.to_string());
    let source = numbers.iter().fold(FORKS.to_owned(), fill);
    guest(folder, &source, &STATIC)
}

const SMALL: [&str; 2] = ["--memory", "64M"];

pub fn a_guest_prints_forks_and_exits() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let elf = forking(&folder, 3, 100_000)?;
    // Again and again: the first fork of a machine meets its being made forkable.
    for _ in 0..10 {
        let done = folder.done(&[&["run", "--bare", &elf][..], &SMALL].concat())?;
        same(&done.code, &10, &done)?;
        let mut lines = done.out.lines();
        same(&lines.next(), &Some("hello"), &done)?;
        let said: Vec<_> = lines.map(|line| line.split_once(" | ")).collect();
        same(&said.len(), &3, &done)?;
        let right = |said: &Option<(&str, &str)>| {
            said.is_some_and(|(id, text)| id.len() == 8 && text == "a child")
        };
        holds(said.iter().all(right), &done)?;
        same(&folder.owners(), &0, &"an owner's folder was left")?;
    }
    Ok(())
}

pub fn children_may_be_killed_with_the_root() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let elf = forking(&folder, 1, 20_000_000)?;
    let done = folder.done(&[&["run", "--bare", &elf, "--kill-children"][..], &SMALL].concat())?;
    same(&done.code, &10, &done)?;
    same(&done.out, &"hello\n", &done)
}

pub fn events_come_as_json() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let elf = forking(&folder, 1, 20_000)?;
    let done = folder.done(&[&["run", "--bare", &elf, "--json"][..], &SMALL].concat())?;
    same(&done.code, &10, &done)?;
    let events: Vec<Value> =
        done.out.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let count = |kind: &str| events.iter().filter(|event| event["event"] == kind).count();
    same(&(count("started"), count("exited")), &(2, 2), &events)?;
    let code = |at: usize| events.iter().filter_map(|event| event["code"].as_i64()).nth(at);
    same(&(code(0), code(1)), &(Some(10), Some(21)), &events)?;
    let text: String = events.iter().filter_map(|event| event["text"].as_str()).collect();
    same(&text, &"hello\na child\n", &events)
}

/// Of an instance that runs, and of one that has ended.
pub fn what_instances_said_is_read_from_elsewhere() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let elf = forking(&folder, 1, 5_000_000)?;
    let mut owner = folder.runtime(&[&["run", "--bare", &elf][..], &SMALL].concat());
    let owner = owner.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (root, child) = until("a child alone", || {
        let listed = folder.json(&["ps", "--all", "--json"]).ok()?;
        let of = |state: &str| {
            let mut all = listed.as_array()?.iter();
            Some(all.find(|one| one["state"] == state)?["uuid"].as_str()?.to_owned())
        };
        Some((of("Stopped")?, of("Running")?))
    })?;
    let said = folder.done(&["logs", &root])?;
    same(&(said.code, said.out.as_str()), &(0, "hello\n"), &said)?;
    let json = folder.json(&["logs", "--json", &root])?;
    same(&(&json["text"], &json["at"]), &(&"hello\n".into(), &0.into()), &json)?;
    let nothing = folder.done(&["logs", &child])?;
    same(&(nothing.code, nothing.out.as_str()), &(0, ""), &nothing)?;
    let followed = folder.done(&["logs", "--follow", &child])?;
    same(&(followed.code, followed.out.as_str()), &(0, "a child\n"), &followed)?;
    same(&super::tools::Done::of(owner)?.code, &10, &"the root's code")
}

pub fn a_crash_has_its_own_code() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let elf = guest(&folder, CRASHES, &STATIC)?;
    let done = folder.done(&[&["run", "--bare", &elf][..], &SMALL].concat())?;
    same(&done.code, &125, &done)?;
    same(&done.err.lines().filter(|line| line.starts_with("error: ")).count(), &1, &done)?;
    holds(done.err.contains(" crashed: "), &done)
}

pub fn a_wrong_elf_is_refused() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let text = folder.0.join("text").display().to_string();
    std::fs::write(&text, "#!/bin/sh\n# long enough to be read as the header of an ELF file\n")?;
    let dynamic = guest(&folder, CRASHES, &["-shared"])?;
    let refused = |path: &str, rule: &str| {
        let done = folder.done(&["run", "--bare", path])?;
        same(&done.code, &64, &done)?;
        same(&done.err.lines().count(), &1, &done)?;
        let start = format!("error: cannot run {path}: ");
        holds(done.err.starts_with(&start) && done.err.contains(rule), &done)
    };
    refused(&text, "no ELF magic")?;
    refused(&dynamic, "not a static executable")?;
    let low = guest(&folder, CRASHES, &["-static", "-no-pie", "-Wl,-Ttext-segment=0x100000"])?;
    refused(&low, "does not lie in guest RAM")?;
    let child = folder.runtime(&["run", "--bare", "/"]).stderr(Stdio::piped()).spawn()?;
    let done = super::tools::Done::of(child)?;
    same(&done.code, &64, &done)
}

/// What only the header of a kernel is, which says that 16,000 bytes follow.
fn cut_off() -> Vec<u8> {
    let mut bytes = vec![0; 0x1000];
    bytes[0x1f1] = 1;
    bytes[0x1f4..0x1f6].copy_from_slice(&1000_u16.to_le_bytes());
    bytes[0x1fe..0x206].copy_from_slice(b"\x55\xaa\xeb\x66HdrS");
    bytes
}

/// Each is one line, and leaves nothing.
pub fn a_linux_guest_that_cannot_boot_is_refused() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let file = |name: &str, bytes: &[u8]| -> Result<String, Failed> {
        let path = folder.0.join(name);
        std::fs::write(&path, bytes)?;
        Ok(path.display().to_string())
    };
    let (text, empty) =
        (file("text", b"no kernel, but text, and long enough")?, file("empty", b"")?);
    let (cut, cut_image) = (file("cut", &cut_off())?, file("image", b"070701 and no end")?);
    let whole_image = file("whole", b"070701 TRAILER!!!")?;
    let large = folder.0.join("large").display().to_string();
    std::fs::File::create(&large)?.set_len(300 << 20)?;
    let elf = guest(&folder, CRASHES, &STATIC)?;
    let long = "x".repeat(17_000);
    let (line, memory) = (&long[..3000], ["--memory", "64M"]);
    for (words, expected) in [
        (&["--kernel", &text][..], "it is no Linux kernel"),
        (&["--kernel", &empty], "it is no Linux kernel"),
        (&["--kernel", &cut], "it is cut off: 4096 of 17024 bytes are there"),
        (&["--kernel", "/nowhere"], "cannot read /nowhere"),
        (&["--kernel", "/"], "cannot read /"),
        (&["--kernel", &elf, "--initrd", "/"], "cannot read /"),
        (&["--kernel", &elf, "--initrd", &large], "see --memory"),
        (&["--kernel", &elf, "--cmdline", line], "3000 bytes, 2047 are allowed"),
        (&["--kernel", &elf, "--image", &cut_image], "image is cut off"),
        (&["--kernel", &elf, "--image", &whole_image, "--", &long], "longer than 16384 bytes"),
    ] {
        let done = folder.done(&[&["run"], &memory[..], words].concat())?;
        same(&done.code, &64, &(words, &done))?;
        same(&done.err.lines().count(), &1, &(words, &done))?;
        holds(done.err.starts_with("error: ") && done.err.contains(expected), &(words, &done))?;
        same(&folder.owners(), &0, &"an owner's folder was left")?;
    }
    Ok(())
}

/// Nobody in it could tell a child that it is one.
pub fn a_linux_guest_without_an_agent_is_forked_only_if_that_is_said() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let elf = guest(&folder, SPINS, &STATIC)?;
    let (child, root) = start(&folder, &["--kernel", &elf])?;
    // It ends with this value.
    let owner = Owner { folder, child, root };
    let (folder, root) = (&owner.folder, root.to_string());
    let refused = folder.done(&["branch", &root])?;
    same(&(refused.code, refused.err.lines().count()), &(70, 1), &refused)?;
    holds(refused.err.contains("no agent answers") && refused.err.contains("--unaware"), &refused)?;
    let made = folder.json(&["branch", &root, "--unaware", "--json"])?;
    same(&made["children"].as_array().map(Vec::len), &Some(1), &made)
}

/// Sockets have short names.
pub fn a_folder_with_too_long_a_name_is_refused() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let deep = folder.0.join("x".repeat(100));
    std::fs::create_dir(&deep)?;
    let mut command = folder.runtime(&["run", "--bare"]);
    command.env("XDG_RUNTIME_DIR", &deep).stdout(Stdio::piped()).stderr(Stdio::piped());
    let done = super::tools::Done::of(command.spawn()?)?;
    same(&done.err.lines().count(), &1, &done)?;
    holds(done.code != 0 && done.err.contains("XDG_RUNTIME_DIR"), &done)?;
    same(&std::fs::read_dir(deep.join("ukp"))?.count(), &0, &"a folder was left")
}
