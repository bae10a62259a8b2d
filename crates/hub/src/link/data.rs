//! Bulk of a link: output up, payloads down.
//!
//! Frames gather while the ones before them are made durable, so that a busy node pays one sync for
//! many. What may gather is bounded; beyond it the stream is left unread, and its window is the credit.

use super::LinkContext;
use super::wire::{HubDatas, bad_message, status};
use bytes::Bytes;
use futures::StreamExt;
use hub_engine::records::{OutputFrame, Stream};
use mesh_core::TaskId;
use mesh_core::permission::Caller;
use mesh_core::task::AttemptNo;
use mesh_process::CancellationToken;
use mesh_wire::convert::id;
use mesh_wire::limits::{OUTPUT_FRAME_BYTES, PAYLOAD_CHUNK_BYTES};
use mesh_wire::node::{self as wire, hub_data, node_data};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// Frames that may gather, and share a sync and a commit: as much as a node sends without an answer.
const TOGETHER: usize = 64;
const OUT_QUEUE: usize = 64;
/// While the hub stops: until the link has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

type Out = mpsc::Sender<Result<wire::HubData, Status>>;

pub fn open(context: Arc<LinkContext>, caller: Caller, cut: CancellationToken, inbound: Streaming<wire::NodeData>) -> HubDatas {
    let (out, frames) = mpsc::channel(OUT_QUEUE);
    let tasks = context.tasks.clone();
    let (stop, links) = (tasks.token(), context.delivery.links.clone());
    tasks.spawn("link data", async move {
        // At a stop the link speaks the last word: were this stream the first to end, nobody would listen.
        let stopped = async {
            stop.cancelled().await;
            while let Caller::Node { node, generation } = caller
                && links.is_current(node, generation)
            {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let served = tokio::select! {
            biased;
            () = cut.cancelled() => Err(status(&hub_engine::nodes::revoked())),
            () = stopped => Ok(()),
            served = serve(&context, &caller, inbound, &out) => served,
        };
        if let Err(e) = served {
            tracing::info!(?caller, error = e.message(), "data stream ended");
            let _ = out.try_send(Err(e));
        }
    });
    ReceiverStream::new(frames).boxed()
}

async fn serve(context: &LinkContext, caller: &Caller, mut inbound: Streaming<wire::NodeData>, out: &Out) -> Result<(), Status> {
    let (ready, mut gathered) = mpsc::channel(TOGETHER);
    let read = async move {
        while let Some(message) = inbound.message().await? {
            match message.kind {
                None => {}
                Some(node_data::Kind::Output(o)) => {
                    metrics::counter!("cortex_output_received_bytes_total").increment(o.data.len() as u64);
                    let frame = read_output(o).inspect_err(|e| {
                        if let Caller::Node { node, .. } = caller {
                            context.delivery.links.refuse(*node, "bad_frame", &e.message());
                        }
                    })?;
                    // The other side is gone only when keeping has failed, which says why.
                    let _ = ready.send(frame).await;
                }
                Some(node_data::Kind::Payload(p)) => send_payload(context, caller, p, out).await?,
            }
        }
        Ok(())
    };
    let keep = async {
        let mut frames = Vec::with_capacity(TOGETHER);
        while gathered.recv_many(&mut frames, TOGETHER).await > 0 {
            keep_frames(context, caller, frames.drain(..), out).await?;
        }
        Ok(())
    };
    tokio::try_join!(keep, read).map(drop)
}

type Key = (TaskId, AttemptNo);

/// Makes frames durable and says so.
async fn keep_frames(
    context: &LinkContext,
    caller: &Caller,
    frames: impl Iterator<Item = (Key, OutputFrame)>,
    out: &Out,
) -> Result<(), Status> {
    let mut attempts: BTreeMap<Key, Vec<OutputFrame>> = BTreeMap::new();
    for (key, frame) in frames {
        attempts.entry(key).or_default().push(frame);
    }
    let appends = attempts
        .into_iter()
        .map(|((task, attempt), frames)| async move { (task, attempt, context.delivery.append(caller, task, attempt, frames).await) });
    for (task, attempt, durable) in futures::future::join_all(appends).await {
        let durable_seq = durable
            .map_err(|e| status(&e))?
            .ok_or_else(|| Status::failed_precondition(format!("output of {task} has a gap; connect again")))?;
        let ack = wire::OutputAck { task_id: task.to_string(), attempt: attempt.0, durable_seq };
        let message = wire::HubData { kind: Some(hub_data::Kind::Output(ack)) };
        out.send(Ok(message)).await.map_err(|_| Status::cancelled("the node is gone"))?;
    }
    Ok(())
}

fn read_output(o: wire::OutputFrame) -> Result<(Key, OutputFrame), Status> {
    if o.data.len() > OUTPUT_FRAME_BYTES || o.data.is_empty() {
        return Err(Status::invalid_argument("output.data: 1 to 65536 bytes a frame"));
    }
    let stream = match o.stream {
        1 => Stream::Stdout,
        2 => Stream::Stderr,
        _ => return Err(Status::invalid_argument("output.stream: 1 or 2")),
    };
    let task = id("output.task_id", &o.task_id).map_err(bad_message)?;
    Ok(((task, AttemptNo(o.attempt)), OutputFrame { seq: o.seq, t_ms: o.t_ms, stream, data: o.data }))
}

async fn send_payload(context: &LinkContext, caller: &Caller, p: wire::PayloadRequest, out: &Out) -> Result<(), Status> {
    let task = id("payload.task_id", &p.task_id).map_err(bad_message)?;
    let chunk = |data: Bytes, last: bool, refused: String| wire::HubData {
        kind: Some(hub_data::Kind::Payload(wire::PayloadChunk {
            sha256: p.sha256.clone(),
            data,
            last,
            refused,
            task_id: p.task_id.clone(),
            attempt: p.attempt,
        })),
    };
    let gone = |_| Status::cancelled("the node is gone");
    match context.delivery.payload(caller, task, AttemptNo(p.attempt), &p.sha256).await {
        Ok(bytes) => {
            let mut bytes = Bytes::from(bytes);
            loop {
                let piece = bytes.split_to(bytes.len().min(PAYLOAD_CHUNK_BYTES));
                let last = bytes.is_empty();
                out.send(Ok(chunk(piece, last, String::new()))).await.map_err(gone)?;
                if last {
                    return Ok(());
                }
            }
        }
        Err(e) => out.send(Ok(chunk(Bytes::new(), true, e.to_string()))).await.map_err(gone),
    }
}
