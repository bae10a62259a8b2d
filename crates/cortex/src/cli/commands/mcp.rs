//! `mcp`: the hub's tools for a program that starts its servers itself.

use super::Context;
use crate::cli::{Fail, Io};
use crate::mcp::Bridge;
use serde_json::Value;
use std::io::{BufRead as _, Read as _};
use tokio::sync::mpsc;

/// Lines that may be read ahead.
const AHEAD: usize = 16;
/// The longest line; the hub takes no larger body.
const MAX_LINE: u64 = 8 << 20;

/// Until standard input ends and what it asked for is answered. Standard output has messages alone.
pub(super) async fn perform(context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let (bridge, mut answers) = Bridge::new(context.client.clone());
    let mut lines = read();
    loop {
        tokio::select! {
            // What is answered goes first.
            biased;
            answer = answers.recv() => match answer {
                Some(answer) => write(context.io, &answer)?,
                None => return Ok(()),
            },
            line = lines.recv() => match line {
                Some(Ok(line)) if line.trim().is_empty() => {}
                Some(Ok(line)) => {
                    if let Some(answer) = bridge.take(&line) {
                        write(context.io, &answer)?;
                    }
                }
                Some(Err(why)) => return Err(Fail::Failed(why)),
                None => break,
            },
        }
    }
    let finish = bridge.finish();
    tokio::pin!(finish);
    loop {
        tokio::select! {
            biased;
            Some(answer) = answers.recv() => write(context.io, &answer)?,
            () = &mut finish => break,
        }
    }
    while let Ok(answer) = answers.try_recv() {
        write(context.io, &answer)?;
    }
    Ok(())
}

fn write(io: &mut Io<'_>, message: &Value) -> Result<(), Fail> {
    writeln!(io.out, "{message}")?;
    Ok(io.out.flush()?)
}

fn read() -> mpsc::Receiver<Result<String, String>> {
    let (out, lines) = mpsc::channel(AHEAD);
    // A read of standard input cannot be broken off, and must not keep the process from leaving: a
    // plain thread ends with it.
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        loop {
            let mut line = vec![];
            let said = match stdin.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
                Ok(0) => return,
                Ok(n) if n as u64 == MAX_LINE && line.last() != Some(&b'\n') => Err(format!("a line is longer than {MAX_LINE} bytes")),
                Ok(_) => String::from_utf8(line).map_err(|_| "a line is no UTF-8".to_owned()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => Err(format!("cannot read standard input: {e}")),
            };
            if out.blocking_send(said).is_err() {
                return;
            }
        }
    });
    lines
}
