//! The files that a measurement needs: where they lie here, and in the nested host.

use std::path::{Path, PathBuf};

use nested_host::image::{self, File};
use nested_host::{CHECK, FILES, Program};

/// Where the helper program lies in the guest.
pub(super) const HELPER: &str = "/bin/ukp-check";
const QEMU: &str = "qemu-system-x86_64";
/// Its firmware for a kernel that is given on the command line, of 64 KiB.
const FIRMWARE: &str = "qboot.rom";
/// Where distributions have it.
const FIRMWARE_IN: [&str; 2] = ["/usr/share/qemu", "/usr/share/qboot"];
/// What vhost-vsock needs besides what guests load, in this order.
const VHOST: [&str; 5] = [
    "vsock.ko",
    "vmw_vsock_virtio_transport_common.ko",
    "vhost_iotlb.ko",
    "vhost.ko",
    "vhost_vsock.ko",
];

/// QEMU.
#[derive(Clone, Debug)]
pub(super) struct Qemu {
    pub(super) program: PathBuf,
    pub(super) firmware: PathBuf,
}

/// Kernel, image, QEMU.
#[derive(Clone, Debug)]
pub(super) struct World {
    /// As `runtime run` boots it: unpacked.
    pub(super) kernel: PathBuf,
    /// As it comes.
    pub(super) packed_kernel: PathBuf,
    pub(super) image: PathBuf,
    /// Or what is missing of it.
    pub(super) qemu: Result<Qemu, String>,
}

impl World {
    /// Looks for everything here; the image is made.
    pub(super) fn find() -> Result<Self, String> {
        if let Some(missing) = image::missing() {
            return Err(missing);
        }
        let helper = File { path: &HELPER[1..], bytes: CHECK, mode: 0o755 };
        let machine_id = File { path: "etc/machine-id", bytes: &[b'0'; 33], mode: 0o644 };
        let built = image::busybox(&[helper, machine_id], &[]);
        let built = built.map_err(|error| format!("the image cannot be made: {error:#}"))?;
        let kernel = guest_image::unpacked(&built.kernel)
            .map_err(|error| format!("the kernel: {}", runtime::sys::chain(&error)))?;
        let packed_kernel = built.kernel;
        Ok(Self { kernel, packed_kernel, image: built.path, qemu: find_qemu() })
    }

    /// As [`World::packed`] has put it.
    pub(super) fn inside() -> Self {
        let file = |name: &str| Path::new(FILES).join(name);
        let program = Path::new("/bin").join(QEMU);
        let firmware = file(FIRMWARE);
        let qemu = if program.exists() && firmware.exists() {
            Ok(Qemu { program, firmware })
        } else {
            Err(format!("{QEMU} was not packed"))
        };
        let (kernel, packed_kernel) = (file("vmlinux"), file("vmlinuz"));
        Self { kernel, packed_kernel, image: file("image"), qemu }
    }

    /// What a program in the nested host is to have.
    pub(super) fn packed(&self) -> Program {
        let mut program = Program {
            files: vec![
                ("vmlinux".to_owned(), self.kernel.clone()),
                ("vmlinuz".to_owned(), self.packed_kernel.clone()),
                ("image".to_owned(), self.image.clone()),
            ],
            ..Program::default()
        };
        if let Ok(qemu) = &self.qemu {
            program.others.push(qemu.program.clone());
            program.files.push((FIRMWARE.to_owned(), qemu.firmware.clone()));
        }
        let folder = nested_host::kernel_folder();
        let modules = VHOST.map(|module| folder.join(module));
        // Without them the scenario says so.
        if modules.iter().all(|module| module.exists()) {
            program.modules = modules.to_vec();
        }
        program
    }
}

fn find_qemu() -> Result<Qemu, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut programs = std::env::split_paths(&path).map(|folder| folder.join(QEMU));
    let program = programs.find(|program| program.is_file());
    let program = program.ok_or_else(|| format!("{QEMU} is not there; ./just installs it"))?;
    let mut places = FIRMWARE_IN.iter().map(|folder| Path::new(folder).join(FIRMWARE));
    let firmware = places.find(|file| file.is_file());
    let firmware =
        firmware.ok_or_else(|| format!("QEMU's {FIRMWARE} is in none of {FIRMWARE_IN:?}"))?;
    Ok(Qemu { program, firmware })
}
