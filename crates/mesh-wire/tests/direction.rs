//! Both directions of a stream number their kinds from 1: what one side says must be no good word of the other.

use mesh_wire::node::{self as wire, hub_data, hub_frame, node_data, node_frame};
use prost::Message;

const TASK: &str = "task_01890000-0000-7000-8000-000000000001";

fn task() -> String {
    TASK.into()
}

#[test]
fn what_a_hub_says_is_no_word_of_a_node() {
    let welcome =
        wire::Welcome { hub_id: "hub_1".into(), hub_time_ms: 1, link_session: vec![1; 16], generation: 1, marks: vec![], bundle: None };
    let envelope = wire::Envelope { payload_type: TASK.into(), body: vec![1; 9], key_id: "k".into(), signature: vec![2; 64] };
    let said = [
        hub_frame::Kind::Welcome(welcome),
        hub_frame::Kind::Envelope(envelope),
        hub_frame::Kind::ResultAck(wire::ResultAck { task_id: task(), attempt: 1 }),
        hub_frame::Kind::Bundle(wire::SignedBundle { body: vec![16; 90], signatures: vec![] }),
        hub_frame::Kind::Goodbye(wire::Goodbye { code: "revoked".into(), detail: "x".into() }),
    ];
    for kind in said {
        let bytes = wire::HubFrame { kind: Some(kind.clone()) }.encode_to_vec();
        match wire::NodeFrame::decode(bytes.as_slice()).map(|f| f.kind) {
            Err(_) => {}
            // Without an outcome, a result ends its link.
            Ok(Some(node_frame::Kind::Result(r))) if r.outcome.is_none() => {}
            Ok(taken) => panic!("{kind:?} would be taken for {taken:?}"),
        }
    }
    let said = [
        hub_data::Kind::Output(wire::OutputAck { task_id: task(), attempt: 1, durable_seq: 7 }),
        hub_data::Kind::Payload(wire::PayloadChunk { sha256: vec![0xff; 32], data: vec![1].into(), task_id: task(), ..Default::default() }),
    ];
    for kind in said {
        let bytes = wire::HubData { kind: Some(kind.clone()) }.encode_to_vec();
        match wire::NodeData::decode(bytes.as_slice()).map(|d| d.kind) {
            Err(_) => {}
            // Without a byte or a stream, output ends its stream.
            Ok(Some(node_data::Kind::Output(o))) if o.data.is_empty() && o.stream == 0 => {}
            Ok(taken) => panic!("{kind:?} would be taken for {taken:?}"),
        }
    }
}
