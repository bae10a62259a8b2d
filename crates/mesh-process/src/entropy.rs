//! Randomness from the operating system.

/// Fills an array with random bytes.
///
/// # Panics
/// When the kernel cannot give randomness: no key or id may be made then.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut b = [0; N];
    getrandom::fill(&mut b).expect("the kernel gives randomness");
    b
}
