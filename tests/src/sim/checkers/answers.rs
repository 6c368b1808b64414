//! Answers: whether a request got one that a client may get, and what it promises from then on.

use tidegate_driver::format::volume_entry::AckLevel;
use tidegate_driver::io::Errno;
use tidegate_driver::volume::RequestKind;

use super::super::disk::lock;
use super::super::door_io::Asked;
use super::super::model::Model;
use super::super::site::Site;

/// Whether the answer to a request is one that a client may get.
pub fn judge(
    asked: &Asked,
    result: Result<(), Errno>,
    ack: AckLevel,
    may_fail: bool,
    payload_max: u64,
    model: &mut Model,
    site: &Site<'_>,
) -> Result<(), String> {
    let request = &asked.request;
    let transfers = matches!(request.kind, RequestKind::Read | RequestKind::Write);
    let wrong =
        request.offset + request.len > model.size(asked.volume) || (transfers && request.len > payload_max);
    if wrong {
        return match result {
            Err(Errno::EINVAL) => Ok(()),
            other => Err(format!("a request that makes no sense ended with {other:?}")),
        };
    }
    match (request.kind, result) {
        (RequestKind::Read, Ok(())) => {
            if asked.got.len() as u64 != request.len {
                return Err("a read delivered nothing".into());
            }
            model.check(asked.volume, request.offset, &asked.got, asked.acknowledged, asked.published)
        }
        (RequestKind::Read, Err(_)) if lock(site.ctl).faults_injected > 0 => Ok(()),
        (RequestKind::Flush, Ok(())) => {
            model.flushed(asked.acknowledged);
            Ok(())
        }
        (_, Ok(())) if request.len == 0 => Ok(()),
        (_, Ok(())) if asked.voided => Err("acknowledged although its content was not fetched".into()),
        (_, Ok(())) => match asked.lsn {
            Some(lsn) => {
                model.acknowledge(lsn, ack == AckLevel::Log || request.fua);
                Ok(())
            }
            None => Err("acknowledged without a place in the log".into()),
        },
        (RequestKind::Write, Err(_)) if asked.voided => Ok(()),
        (_, Err(_)) if may_fail => Ok(()),
        (_, Err(errno)) => Err(format!("failed with {errno}, but nothing excuses that")),
    }
}
