//! Messages in sessions.

use crate::dialect::Row;
use crate::rows::{Columns, Id};
use crate::sessions::{above, note, touch};
use crate::sql::{Rows, sql, values};
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{Messages, Stored, Window};
use hub_engine::records::{Message, MessageRole, Part, SessionAct};
use mesh_core::{MessageId, SessionId, UserId};

const COLUMNS: &str = "id, session, role, content, created_at";

#[async_trait]
impl Messages for Store {
    async fn add_message(&self, message: &Message, by: Option<UserId>) -> Stored<Option<Message>> {
        self.write("messages.add_message", (message.clone(), by), |conn, (message, by)| {
            Box::pin(async move {
                if !touch(conn, message.session, message.created_at).await? {
                    return Ok(None);
                }
                let newest = sql("SELECT id FROM messages WHERE session = $1 ORDER BY id DESC LIMIT 1").bind(message.session.blob());
                let newest = conn.row(&newest, |row| Columns::of(row).bytes()).await?;
                let m = Message { id: MessageId::from_bytes(above(newest, *message.id.as_bytes())), ..message.clone() };
                let row = values![m.id.blob(), m.session.blob(), m.role.as_str(), m.content.as_bytes().to_vec(), m.created_at];
                conn.insert("messages", COLUMNS, &Rows::of([row]), "").await?;
                note(conn, m.session, (SessionAct::Message, &m.id.to_string()), *by, m.created_at).await?;
                Ok(Some(m))
            })
        })
        .await
    }

    async fn messages(&self, session: SessionId, window: Window<MessageId>, max_bytes: u64) -> Stored<Part<Message>> {
        let filter = || sql("WHERE session = $1").bind(session.blob());
        self.part("messages.messages", (COLUMNS, "messages", "content"), filter, window, max_bytes, message).await
    }
}

fn message(row: &Row) -> Result<Message, Failed> {
    let c = &mut Columns::of(row);
    let (id, session, role) = (c.id()?, c.id()?, c.word(MessageRole::parse)?);
    Ok(Message { id, session, role, content: String::from_utf8(c.get()?)?, created_at: c.get()? })
}
