//! Bare guests that mean harm, and hosts that have nothing left.

use std::os::unix::process::CommandExt;
use std::process::Stdio;

use libtest_mimic::Failed;

use super::guest::{STATIC, guest};
use super::tools::{Done, Folder, holds, same};

/// Forks a child that does `HARM`, waits for a while, forks another one that ends with 30, and ends
/// with 10 if its own memory is as it was.
///
/// `garbage` writes and reads in all sizes at random ports of the doorbell, and what it finds goes
/// into its parameter page: all but what would end it, stand still for long, or fork by the hundred.
/// Three times it forks, and both sides go on.
const HOSTILE: &str = r#"
        .globl  _start
_start: mov     %rdi, page(%rip)
        mov     $0x1234567, %r15d
        xor     %eax, %eax
        mov     $0xd18, %edx
        out     %eax, %dx
        call    fork
        test    %eax, %eax
        jnz     harm
        mov     $300000, %eax
        mov     $0xd1c, %edx
        out     %eax, %dx
        call    fork
        test    %eax, %eax
        mov     $30, %eax
        jnz     exit
        mov     $10, %eax
        cmp     $0x1234567, %r15d
        jne     wrong
        cmpq    $0, harmed(%rip)
        je      exit
wrong:  mov     $98, %eax
exit:   mov     $0xd08, %edx
        out     %eax, %dx
        jmp     exit

fork:   mov     $1, %eax
        mov     $0xd00, %edx
        out     %eax, %dx
        lea     answer(%rip), %rdi
        mov     $24, %ecx
        rep insl
        mov     $99, %eax
        cmpl    $0, answer(%rip)
        jne     exit
        mov     answer+4(%rip), %eax
        ret

harm:   movq    $1, harmed(%rip)
        HARM

random: mov     %r15, %rax
        shl     $13, %rax
        xor     %rax, %r15
        mov     %r15, %rax
        shr     $7, %rax
        xor     %rax, %r15
        mov     %r15, %rax
        shl     $17, %rax
        xor     %rax, %r15
        mov     %r15, %rax
        ret

garbage:
        mov     $2500, %r14d
        mov     $3, %r13d
again:  call    random
        mov     %rax, %rbx
        mov     %eax, %edx
        and     $0x1f, %edx
        add     $0xd00, %edx
        cmp     $0xd08, %edx
        je      next
        cmp     $0xd1c, %edx
        je      next
        call    random
        cmp     $0xd10, %edx
        je      1f
        cmp     $0xd00, %edx
        jne     2f
        test    $0x700, %ebx
        jnz     1f
        dec     %r13d
        js      1f
        mov     $1, %eax
        out     %eax, %dx
        jmp     next
1:      or      $0x80000000, %eax
        out     %eax, %dx
        jmp     next
2:      mov     page(%rip), %rdi
        mov     %rdi, %rsi
        shr     $32, %rbx
        mov     %ebx, %ecx
        and     $0xff, %ecx
        shr     $8, %ebx
        and     $7, %ebx
        jz      3f
        dec     %ebx
        jz      4f
        dec     %ebx
        jz      5f
        dec     %ebx
        jz      6f
        dec     %ebx
        jz      7f
        dec     %ebx
        jz      8f
        dec     %ebx
        jz      9f
        out     %eax, %dx
        jmp     next
3:      out     %al, %dx
        jmp     next
4:      out     %ax, %dx
        jmp     next
5:      in      %dx, %al
        mov     %al, (%rdi,%rcx)
        jmp     next
6:      in      %dx, %eax
        mov     %eax, 64(%rdi,%rcx)
        jmp     next
7:      and     $0x1f, %ecx
        rep outsb
        jmp     next
8:      rep insl
        jmp     next
9:      call    random
        mov     %rax, (%rdi,%rcx,8)
next:   dec     %r14d
        jnz     again
        lea     done(%rip), %rsi
        mov     $done_end - done, %ecx
        mov     $0xd0c, %edx
        rep outsb
        mov     $0xdead004d, %eax
        jmp     exit

# From the first page on, page tables and descriptor tables among them.
memory: xor     %edi, %edi
        mov     $0x800000, %ecx
        mov     $0xa5, %al
        rep stosb
        ud2

done:   .ascii  "\n@garbage done\n"
done_end:
        .data
page:   .quad   0
harmed: .quad   0
        .bss
        .balign 128
answer: .skip   96
        .section .note.GNU-stack, "", @progbits
"#;

fn hostile(folder: &Folder, harm: &str) -> Result<Done, Failed> {
    let elf = guest(folder, &HOSTILE.replace("HARM", &format!("jmp {harm}")), &STATIC)?;
    let done = folder.done(&["run", "--bare", &elf, "--memory", "32M", "--json"])?;
    same(&done.code, &10, &done)?;
    same(&folder.owners(), &0, &"an owner's folder was left")?;
    Ok(done)
}

/// Exit codes and reasons of all machines, by the events of the owner.
fn ends(done: &Done) -> Result<Vec<(i64, Option<String>)>, Failed> {
    let mut ends = Vec::new();
    for line in done.out.lines() {
        let event: serde_json::Value = serde_json::from_str(line)?;
        if event["event"] == "exited" {
            let why = event["why"].as_str().or_else(|| event["reason"].as_str());
            ends.push((event["code"].as_i64().unwrap_or(-1), why.map(str::to_owned)));
        }
    }
    ends.sort();
    Ok(ends)
}

pub fn garbage_at_the_doorbell_harms_nobody_else() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let done = hostile(&folder, "garbage")?;
    let ends = ends(&done)?;
    let with = |code: i64| ends.iter().filter(|(ended, _)| *ended == code).count();
    same(&(with(10), with(30)), &(1, 1), &ends)?;
    // The child, and what it forked.
    same(&with(77), &(ends.len() - 2), &ends)?;
    holds(ends.len() > 2, &ends)
}

pub fn garbage_in_all_memory_ends_the_instance_alone() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let done = hostile(&folder, "memory")?;
    let ends = ends(&done)?;
    let codes: Vec<i64> = ends.iter().map(|(code, _)| *code).collect();
    same(&codes, &vec![10, 30, 125], &ends)?;
    let why = ends.last().and_then(|(_, why)| why.clone()).unwrap_or_default();
    holds(!why.is_empty() && !why.contains('\n'), &ends)
}

/// By a limit on this process's memory, as a small host has it.
pub fn no_memory_left_is_one_line() -> Result<(), Failed> {
    let folder = Folder::new()?;
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", "ulimit -v 2000000; exec \"$@\"", "sh", super::tools::RUNTIME])
        .args(["run", "--bare", "--memory", "8G"])
        .env("XDG_RUNTIME_DIR", &folder.0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let done = Done::of(command.spawn()?)?;
    holds(done.code != 0, &done)?;
    let errors: Vec<&str> = done.err.lines().filter(|line| line.starts_with("error: ")).collect();
    same(&errors.len(), &1, &done)?;
    same(&done.err.lines().count(), &1, &done)?;
    holds(done.err.contains("memory"), &done)?;
    same(&folder.owners(), &0, &"an owner's folder was left")
}
