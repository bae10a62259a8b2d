//! Gives the payload back. No process and no memory: a repeated order has the same answer.

use super::{Step, refused};
use mesh_core::task::{Outcome, ReasonCode};

pub const NAME: &str = "echo";
/// A result travels in one frame of the control stream; hubs refuse larger ones.
pub const MOST_BYTES: usize = 256 << 10;

pub fn step(payload: Vec<u8>) -> Step {
    if payload.len() > MOST_BYTES {
        return refused(ReasonCode::Limit, format!("echo gives back at most {MOST_BYTES} bytes, not {}", payload.len()));
    }
    Step::Over { outcome: Outcome::Done, result: payload }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_comes_back() {
        assert!(matches!(step(b"hi".to_vec()), Step::Over { outcome: Outcome::Done, result } if result == b"hi"));
        assert!(matches!(step(vec![0; MOST_BYTES + 1]), Step::Over { outcome: Outcome::NeverStarted(_), .. }));
    }
}
