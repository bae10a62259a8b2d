//! A bare warden process, for the tests: `warden --data-dir X` as the product's own subcommand, and a
//! few bounds that tests make small.

use std::time::Duration;

fn main() {
    let mut args = std::env::args().skip(1).filter(|a| a != "warden");
    let mut config = node_warden::Config::new("");
    // A failed test leaves nothing behind for long.
    config.orphan_after = Duration::from_secs(300);
    while let Some(name) = args.next() {
        let value = args.next().unwrap_or_else(|| panic!("{name} needs a value"));
        let number = || value.parse::<u64>().unwrap_or_else(|e| panic!("{name}: {e}"));
        match name.as_str() {
            "--data-dir" => config.data_dir = value.into(),
            "--beside" => config.beside = Some(value.into()),
            "--attempt-bytes" => config.spool_attempt_bytes = number(),
            "--node-bytes" => config.spool_node_bytes = number(),
            "--grace-ms" => config.grace = Duration::from_millis(number()),
            "--orphan-ms" => config.orphan_after = Duration::from_millis(number()),
            _ => panic!("unknown option {name}"),
        }
    }
    if let Err(e) = node_warden::run(config) {
        eprintln!("warden: {e}");
        std::process::exit(1);
    }
}
