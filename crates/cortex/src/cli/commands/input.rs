//! Standard input on its way to a running task.

use crate::rest::InputRequest;
use crate::{Client, Error};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as B64;
use mesh_wire::limits::INPUT_BYTES;
use std::io::Read as _;
use std::time::Duration;
use tokio::sync::mpsc;

/// Pieces that may be read ahead of the hub; beyond it standard input is left unread.
const AHEAD: usize = 4;
/// Until a piece is sent again that could not be taken yet.
const AGAIN: Duration = Duration::from_millis(500);

/// Reads standard input as it comes. The channel ends with it.
pub(super) fn read() -> mpsc::Receiver<Vec<u8>> {
    let (pieces, ahead) = mpsc::channel(AHEAD);
    // A read of standard input cannot be broken off, and must not keep the process from leaving: a
    // plain thread ends with it.
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; INPUT_BYTES];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => {
                    if pieces.blocking_send(buffer[..n].to_vec()).is_err() {
                        return;
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    ahead
}

/// Sends all pieces, then the end; gives why it cannot go on. A task that ends or that wants no more
/// is no failure: a local pipe would break just so.
pub(super) async fn feed(client: Client, id: String, mut pieces: mpsc::Receiver<Vec<u8>>) -> Option<Error> {
    let mut seq = 0;
    loop {
        seq += 1;
        let piece = pieces.recv().await;
        let eof = piece.is_none();
        let request = InputRequest { seq, data_base64: piece.map(|p| B64.encode(p)), eof: eof.then_some(true), resize: None };
        match deliver(&client, &id, &request).await {
            Ok(()) if eof => return None,
            Ok(()) => {}
            Err(e) if matches!(e.code(), Some("task_ended" | "input_closed")) => return None,
            Err(e) => return Some(e),
        }
    }
}

/// One piece, again and again until it is taken: the hub and the node know its number.
async fn deliver(client: &Client, id: &str, request: &InputRequest) -> Result<(), Error> {
    loop {
        match client.send_input(id, request).await {
            Ok(_) => return Ok(()),
            Err(e) if e.is_transient() || e.code() == Some("not_running") => tokio::time::sleep(AGAIN).await,
            Err(e) => return Err(e),
        }
    }
}
