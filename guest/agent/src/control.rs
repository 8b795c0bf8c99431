//! The unix socket by which programs in the guest talk to its init.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guest_wire::{FrameError, WorkloadState, read_control, write_control};
use serde::{Deserialize, Serialize};

use crate::fs::Service;
use crate::init::Ending;
use crate::processes::since_boot;
use crate::stats::Stats;
use crate::sync::lock;

/// Where it is.
pub const SOCKET: &str = "/run/ukp.sock";
/// How long a program may take to say what it wants.
const LIMIT: Duration = Duration::from_secs(2);

/// What a program may want.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Wish {
    /// End the machine.
    Exit { code: u8 },
    /// Tell how it is.
    Status,
}

/// How the machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Who it is, and its forks.
    #[serde(flatten)]
    pub stats: Stats,
    /// The workload.
    pub workload: WorkloadState,
    /// Since its root was booted, in milliseconds.
    pub uptime_ms: u64,
}

/// Listens in the background. Only root may connect.
///
/// # Errors
///
/// There is no socket, or no thread.
pub fn listen(
    at: &Path,
    service: Arc<Service>,
    workload: Arc<Mutex<WorkloadState>>,
    ending: Ending,
) -> io::Result<()> {
    if let Err(error) = fs::remove_file(at)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let listener = UnixListener::bind(at)?;
    fs::set_permissions(at, Permissions::from_mode(0o600))?;
    let serve = move || {
        for stream in listener.incoming() {
            match stream {
                // One that says nothing, or nonsense, gets no answer.
                Ok(stream) => drop(answer(&stream, &service, &workload, &ending)),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    };
    std::thread::Builder::new().name("ukp-control".into()).spawn(serve).map(drop)
}

fn answer(
    mut stream: &UnixStream,
    service: &Service,
    workload: &Mutex<WorkloadState>,
    ending: &Ending,
) -> Result<(), FrameError> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    match read_control(&mut stream)? {
        Some(Wish::Exit { code }) => ending.end(code),
        Some(Wish::Status) => {
            let status = MachineStatus {
                stats: service.stats(),
                workload: *lock(workload),
                uptime_ms: u64::try_from(since_boot().as_millis()).unwrap_or(u64::MAX),
            };
            write_control(&mut stream, &status)
        }
        None => Ok(()),
    }
}

/// Asks the init at `socket` to end the machine. Returns only if it does not.
///
/// # Errors
///
/// There is no init, or it did not end the machine.
pub fn exit(socket: &Path, code: u8) -> Result<(), FrameError> {
    let mut stream = UnixStream::connect(socket)?;
    write_control(&mut stream, &Wish::Exit { code })?;
    match read_control::<MachineStatus>(&mut stream)? {
        None => {
            // Its end of the connection may be gone a moment before everybody else is.
            std::thread::sleep(LIMIT);
            Err(io::Error::other("the machine's init did not end it").into())
        }
        Some(_) => Ok(()),
    }
}

/// Asks the init at `socket` how the machine is.
///
/// # Errors
///
/// There is no init, or it does not answer.
pub fn status(socket: &Path) -> Result<MachineStatus, FrameError> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    write_control(&mut stream, &Wish::Status)?;
    let answer = read_control(&mut stream)?;
    answer.ok_or_else(|| io::Error::other("the machine's init gave no answer").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_may_ask_how_the_machine_is() {
        let at = std::env::temp_dir().join(format!("guest-agent-{}.sock", std::process::id()));
        let service = Service::new(1, Duration::ZERO);
        let own = uuid::Uuid::new_v4();
        service.welcomed(own);
        let workload = Arc::new(Mutex::new(WorkloadState::Running { pid: 3 }));
        listen(&at, service, workload, Ending::default()).unwrap();
        let mode = fs::metadata(&at).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
        let status = status(&at).unwrap();
        assert_eq!((status.stats.uuid, status.workload), (own, WorkloadState::Running { pid: 3 }));
        fs::remove_file(at).unwrap();
    }
}
