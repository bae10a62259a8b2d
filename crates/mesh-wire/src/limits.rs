//! Sizes that both ends of a wire must agree on.

/// A frame on the task stream. Buffers of a connection never shrink, so frames stay small.
pub const TASK_FRAME_BYTES: usize = 4 << 10;
/// An envelope of orders.
pub const ENVELOPE_BYTES: usize = 32 << 10;
/// Orders that one envelope may carry.
pub const ORDERS_PER_ENVELOPE: usize = 64;
/// Data of one piece of live input: with its envelope well within [`ENVELOPE_BYTES`].
pub const INPUT_BYTES: usize = mesh_core::input::MAX_PIECE_BYTES;
/// Data of one output frame.
pub const OUTPUT_FRAME_BYTES: usize = 64 << 10;
/// A piece of a pulled payload.
pub const PAYLOAD_CHUNK_BYTES: usize = 64 << 10;
/// What a decoder accepts on the link before it refuses a message unread.
pub const MAX_MESSAGE_BYTES: usize = 512 << 10;
/// Seconds between heartbeats, both ways.
pub const HEARTBEAT_SECS: u64 = 5;
/// Seconds of silence after which the other side counts as gone.
pub const SILENCE_SECS: u64 = 15;
/// Who notices the silence so much later than it was due stood still itself, and listens for one heartbeat more.
pub const STOOD_STILL_MS: u64 = 1000;
/// The HTTP/2 windows that keep a heartbeat quick beside bulk.
pub const STREAM_WINDOW_BYTES: u32 = 64 << 10;
pub const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
