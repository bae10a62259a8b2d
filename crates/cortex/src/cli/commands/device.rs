//! `device`: the own log-ins.

use super::{Context, is_id, pick};
use crate::cli::args::{DeviceCommand, Format};
use crate::cli::{Fail, output};
use crate::rest::{DevicePatch, DeviceView};

pub(super) async fn perform(command: DeviceCommand, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match command {
        DeviceCommand::Ls => ls(context).await,
        DeviceCommand::Rm { device } => {
            let id = device_id(&device, context).await?;
            context.client.delete_device(&id).await?;
            context.tell("its log-in is ended");
            Ok(())
        }
        DeviceCommand::Trust { device, off } => {
            let id = device_id(&device, context).await?;
            let changed = context.client.change_device(&id, &DevicePatch { name: None, trusted: Some(!off) }).await?;
            match context.format() {
                Format::Json => output::json(context.io, &changed),
                Format::Table => {
                    context.tell(state(&changed));
                    Ok(())
                }
            }
        }
    }
}

async fn device_id(text: &str, context: &Context<'_, '_>) -> Result<String, Fail> {
    if is_id(text, "dev_") {
        return Ok(text.to_owned());
    }
    let devices = context.client.devices().await?;
    Ok(pick("device", text, &devices, |d| (&d.id, &d.name), |_| true)?.id.clone())
}

fn state(d: &DeviceView) -> &'static str {
    match (d.new, d.trusted) {
        (true, _) => "new",
        (false, true) => "trusted",
        (false, false) => "not trusted",
    }
}

async fn ls(context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let devices = context.client.devices().await?;
    let now = context.now_ms;
    output::list(context.io, context.format(), &devices, &["name", "state", "first", "last", "address", "this", "id"], |d| {
        vec![
            output::cell(&d.name),
            state(d).to_owned(),
            output::ago(Some(&d.first_seen_at), now),
            output::ago(Some(&d.last_seen_at), now),
            output::or_dash(d.address.as_deref()),
            if d.current { "yes" } else { "" }.to_owned(),
            output::cell(&d.id),
        ]
    })
}
