//! The program as its users meet it.
//!
//! Tests that need `/dev/kvm` are reported as ignored, by name, where there is none.

mod guest;
mod host;
mod hostile;
mod lacking;
mod tools;
mod tree;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

type Test = fn() -> Result<(), Failed>;

/// Tests that run everywhere.
const PURE: &[(&str, Test)] = &[
    ("usage_errors_are_one_line", host::usage_errors_are_one_line),
    ("an_image_is_made_and_kept", host::an_image_is_made_and_kept),
    ("every_verb_has_help", host::every_verb_has_help),
    ("completions_know_the_verbs", host::completions_know_the_verbs),
    ("doctor_speaks_json", host::doctor_speaks_json),
    ("nothing_runs_and_ps_says_so", tree::nothing_runs_and_ps_says_so),
];

/// Tests that run machines.
const DIRECT: &[(&str, Test)] = &[
    ("a_guest_prints_forks_and_exits", guest::a_guest_prints_forks_and_exits),
    ("children_may_be_killed_with_the_root", guest::children_may_be_killed_with_the_root),
    ("events_come_as_json", guest::events_come_as_json),
    (
        "what_instances_said_is_read_from_elsewhere",
        guest::what_instances_said_is_read_from_elsewhere,
    ),
    ("a_crash_has_its_own_code", guest::a_crash_has_its_own_code),
    ("a_wrong_elf_is_refused", guest::a_wrong_elf_is_refused),
    ("a_linux_guest_that_cannot_boot_is_refused", guest::a_linux_guest_that_cannot_boot_is_refused),
    (
        "a_linux_guest_without_an_agent_is_forked_only_if_that_is_said",
        guest::a_linux_guest_without_an_agent_is_forked_only_if_that_is_said,
    ),
    ("a_folder_with_too_long_a_name_is_refused", guest::a_folder_with_too_long_a_name_is_refused),
    (
        "garbage_at_the_doorbell_harms_nobody_else",
        hostile::garbage_at_the_doorbell_harms_nobody_else,
    ),
    (
        "garbage_in_all_memory_ends_the_instance_alone",
        hostile::garbage_in_all_memory_ends_the_instance_alone,
    ),
    ("no_memory_left_is_one_line", hostile::no_memory_left_is_one_line),
    ("a_tree_is_seen_and_killed", tree::a_tree_is_seen_and_killed),
    ("pause_stop_wait_and_stats", tree::pause_stop_wait_and_stats),
    ("stats_and_trace_show_what_the_probes_saw", tree::stats_and_trace_show_what_the_probes_saw),
    ("probes_can_be_off", tree::probes_can_be_off),
    ("names_must_be_clear", tree::names_must_be_clear),
    ("ctrl_c_leaves_nothing", tree::ctrl_c_leaves_nothing),
    ("a_killed_owner_leaves_no_process", tree::a_killed_owner_leaves_no_process),
];

/// Tests that run machines as if this host, or its user, lacked something.
const LACKING: &[(&str, Test)] = &[
    ("without_btf_machines_fork", lacking::without_btf_machines_fork),
    ("without_capabilities_machines_fork", lacking::without_capabilities_machines_fork),
    ("in_a_user_namespace_machines_fork", lacking::in_a_user_namespace_machines_fork),
    ("in_a_pid_namespace_machines_fork", lacking::in_a_pid_namespace_machines_fork),
    ("the_advised_capabilities_are_enough", lacking::the_advised_capabilities_are_enough),
];

fn main() -> ExitCode {
    let missing = !std::path::Path::new("/dev/kvm").exists();
    if missing {
        eprintln!("ignored: {} tests that run machines: there is no /dev/kvm", DIRECT.len());
    }
    let trial = |(name, test): &(&'static str, Test)| Trial::test(*name, *test);
    let pure = PURE.iter().map(trial);
    let stays = host::kvm_stays();
    let hidden =
        ("without_kvm_the_exit_code_says_so", host::without_kvm_the_exit_code_says_so as Test);
    if let Some(reason) = stays {
        eprintln!("ignored: {}: {reason}", hidden.0);
    }
    let hidden = trial(&hidden).with_kind(stays.unwrap_or("")).with_ignored_flag(stays.is_some());
    let direct = DIRECT.iter().map(|test| {
        let kind = if missing { "no /dev/kvm" } else { "direct" };
        trial(test).with_kind(kind).with_ignored_flag(missing)
    });
    let cannot = if missing { Some("no /dev/kvm") } else { lacking::cannot() };
    if let (Some(reason), false) = (cannot, missing) {
        eprintln!("ignored: {} tests of hosts that lack something: {reason}", LACKING.len());
    }
    let lacking = LACKING.iter().map(|test| {
        trial(test).with_kind(cannot.unwrap_or("direct")).with_ignored_flag(cannot.is_some())
    });
    let all = pure.chain([hidden]).chain(direct).chain(lacking);
    libtest_mimic::run(&Arguments::from_args(), all.collect()).exit_code()
}
