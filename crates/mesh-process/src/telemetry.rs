//! Logs on standard error, as lines for people or JSON for programs.

use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry};

/// Something else that wants to know of spans.
pub type Besides = Box<dyn Layer<Registry> + Send + Sync>;

/// Starts logging. `level` is a filter such as `info` or `info,cortex_hub=debug`.
pub fn init(level: &str, json: bool) -> Result<(), String> {
    init_with(level, json, None)
}

/// Starts logging, and whatever else listens.
pub fn init_with(level: &str, json: bool, besides: Option<Besides>) -> Result<(), String> {
    let filter = check(level)?;
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    // A log that cannot be written (a full disk, a closed pipe) is told on standard error by default,
    // which is the same file: that would be a panic.
    let lines = tracing_subscriber::fmt::layer().with_ansi(colours).with_writer(std::io::stderr).log_internal_errors(false);
    // One object a line: time, level and target, the event's own fields, and those of its span.
    let lines = if json {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).with_filter(filter).boxed()
    } else {
        lines.with_target(false).with_filter(filter).boxed()
    };
    // A second call (tests in one process) keeps the first subscriber.
    let _ = tracing_subscriber::registry().with(besides).with(lines).try_init();
    Ok(())
}

/// Reads a filter.
pub fn check(level: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(level).map_err(|e| format!("{level:?} is not a log filter: {e}"))
}
