//! Waits for programs and runs them.

use guest_abi::{
    param::{Header, RESULTS, STEPS, Step, op, who},
    port::{DONE, PARK, exit_code},
};

use crate::{console, error::Bad, ops, param::Param, port};

/// Runs the programs of one vCPU, one after another, for ever.
pub(crate) fn serve(vcpu: u64, param: Param) -> ! {
    let mut machine = Machine { vcpu, param, header: Header::default(), run: Run::default() };
    let mut done = 0;
    loop {
        port::write_low(PARK, done);
        // The runtime may wake a parked vCPU for reasons of its own: only the number counts.
        let seq = machine.param.seq();
        if seq == done {
            continue;
        }
        if let Err((step, bad)) = machine.run_program() {
            console::line(format_args!(
                "guest-bare: vCPU {vcpu}, program {seq}, step {step}: {bad}"
            ));
            port::exit(exit_code::BAD_PROGRAM);
        }
        port::write_low(DONE, seq);
        done = seq;
    }
}

/// One vCPU and the program that it runs.
pub(crate) struct Machine {
    /// Index of this vCPU.
    pub(crate) vcpu: u64,
    /// Header of the program that runs.
    pub(crate) header: Header,
    param: Param,
    run: Run,
}

/// What a program knows about its past. It lies on the stack, so a child has its own.
struct Run {
    /// One of [`who::PARENT`] and [`who::CHILD`].
    role: u16,
    /// How often each [`op::LOOP`] was reached.
    reached: [u64; STEPS],
}

impl Default for Run {
    fn default() -> Self {
        Self { role: who::PARENT, reached: [0; STEPS] }
    }
}

impl Machine {
    /// Stores result `index` of `step`.
    pub(crate) fn set_result(&self, step: &Step, index: usize, value: u64) {
        self.param.set_result(usize::from(step.result) + index, value);
    }

    /// From here on this is the parent or a child of the last fork.
    pub(crate) fn set_role(&mut self, role: u16) {
        self.run.role = role;
    }

    /// Runs the program in the parameter page to its end, or to the step at which it is wrong.
    fn run_program(&mut self) -> Result<(), (usize, Bad)> {
        self.run = Run::default();
        self.header = self.param.header();
        let mut next = 0;
        while next < STEPS {
            let at = next;
            let step = self.param.step(at);
            next = match self.take(at, &step).map_err(|bad| (at, bad))? {
                Next::Step => at + 1,
                Next::Goto(target) => target,
                Next::End => break,
            };
        }
        Ok(())
    }

    fn take(&mut self, at: usize, step: &Step) -> Result<Next, Bad> {
        // The zeroes behind the last step end the program for everybody.
        if step.op == op::END && step.who == 0 {
            return Ok(Next::End);
        }
        if step.who == 0 || step.who & !who::ALL != 0 {
            return Err(Bad::Who(step.who));
        }
        if step.who & self.run.role == 0 {
            return Ok(Next::Step);
        }
        match step.op {
            op::END => Ok(Next::End),
            op::LOOP => self.take_loop(at, step),
            _ => {
                check_results(step)?;
                ops::execute(self, step)?;
                Ok(Next::Step)
            }
        }
    }

    fn take_loop(&mut self, at: usize, step: &Step) -> Result<Next, Bad> {
        let [target, times, ..] = step.args;
        let target = ops::at_most('a', target, STEPS - 1)?;
        self.run.reached[at] += 1;
        Ok(if self.run.reached[at] < times { Next::Goto(target) } else { Next::Step })
    }
}

/// Where a program goes on.
enum Next {
    Step,
    Goto(usize),
    End,
}

/// Whether all result words of `step` exist. Before the step runs: a fork whose answer has no place
/// must not happen.
fn check_results(step: &Step) -> Result<(), Bad> {
    let count = ops::results(step.op).ok_or(Bad::Op(step.op))?;
    if usize::from(step.result) + count <= RESULTS {
        Ok(())
    } else {
        Err(Bad::Results { first: step.result, count })
    }
}
