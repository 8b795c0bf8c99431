//! Where every vCPU starts, and where a panic ends.
#![expect(
    unsafe_code,
    reason = "exports the entry point and takes the runtime's word for its arguments"
)]

use core::panic::PanicInfo;

use guest_abi::{param::ParamPage, port::exit_code};

use crate::{console, interpreter, param::Param, port};

/// Entry point. The stack is as after a call and the arguments are where the System V calling
/// convention has them ([`guest_abi::entry`]), so that no assembly stands before it.
// SAFETY: no other symbol of that name exists: the C runtime is not linked (`-nostartfiles`).
#[unsafe(no_mangle)]
extern "C" fn _start(page: *mut ParamPage, vcpu: u64) -> ! {
    // SAFETY: the runtime passes the address of this vCPU's parameter page in `rdi`: mapped,
    // page-aligned, there for as long as the machine is, and used by no other vCPU.
    let param = unsafe { Param::new(page) };
    interpreter::serve(vcpu, param)
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    console::line(format_args!("guest-bare: {info}"));
    port::exit(exit_code::PANIC)
}
