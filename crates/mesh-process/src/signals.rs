//! What ends a process from outside.

use tokio::signal::unix::{SignalKind, signal};

/// Which signal asked for the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// SIGINT: a person at the terminal.
    Interrupt,
    /// SIGTERM: a service manager.
    Terminate,
}

impl Asked {
    /// By which a shell tells that a process ended by this signal.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

/// Waits for SIGINT or SIGTERM.
pub async fn shutdown() -> std::io::Result<Asked> {
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        biased;
        _ = int.recv() => Ok(Asked::Interrupt),
        _ = term.recv() => Ok(Asked::Terminate),
    }
}
