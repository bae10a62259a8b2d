//! Generates the link's code from `protos/` with a compiler written in Rust: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../../protos");
    let files = protox::compile(["cortex/node/v1/node.proto"], ["../../protos"])?;
    tonic_prost_build::configure()
        .bytes(".cortex.node.v1.OutputFrame.data")
        .bytes(".cortex.node.v1.PayloadChunk.data")
        .compile_fds(files)?;
    Ok(())
}
