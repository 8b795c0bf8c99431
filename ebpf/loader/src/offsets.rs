//! Where the kernel has what the probes read, from its own description of its types.

use btf_rs::{Backend, Btf, Type};

use crate::error::ProbeError;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offsets {
    pub(crate) task_pid: u32,
    pub(crate) task_tgid: u32,
}

impl Offsets {
    pub(crate) fn of_this_kernel() -> Result<Self, ProbeError> {
        // Its own error does not tell a missing file from a wrong one.
        std::fs::File::open(VMLINUX).map_err(ProbeError::NoBtf)?;
        let what = "task_struct";
        let btf = Btf::from_file_with_backend(VMLINUX, Backend::Mmap)
            .or_else(|_| Btf::from_file(VMLINUX))
            .map_err(|_| ProbeError::Btf { what })?;
        let types = btf.resolve_types_by_name(what).map_err(|_| ProbeError::Btf { what })?;
        let task = types.into_iter().find_map(|found| match found {
            Type::Struct(task) => Some(task),
            _ => None,
        });
        let task = task.ok_or(ProbeError::Btf { what })?;
        let offset = |name: &str, what| {
            let mut members = task.members.iter();
            let member =
                members.find(|member| btf.resolve_name(*member).is_ok_and(|found| found == name));
            member.map(|member| member.bit_offset() / 8).ok_or(ProbeError::Btf { what })
        };
        Ok(Self {
            task_pid: offset("pid", "task_struct.pid")?,
            task_tgid: offset("tgid", "task_struct.tgid")?,
        })
    }
}
