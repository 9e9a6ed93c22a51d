//! TensorBoard event files: TFRecord framing around `Event` messages with scalar summaries.
//!
//! Framing after TensorFlow's `lib/io/record_writer.h`; fields after `tensorboard/compat/proto/{event,summary}.proto`:
//! Event { wall_time 1 double, step 2 int64, file_version 3 string, summary 5 }, Summary { value 1 }, Value { tag 1, simple_value 2 float }.

use super::StepMetrics;

/// An event file of these steps.
pub(super) fn event_file(records: &[StepMetrics]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut head = Vec::new();
    double(&mut head, 1, records.first().map_or(0.0, wall_time));
    bytes(&mut head, 3, b"brain.Event:2");
    record(&mut out, &head);
    for step in records {
        let mut summary = Vec::new();
        for (tag, value) in step.scalars() {
            let mut scalar = Vec::new();
            bytes(&mut scalar, 1, tag.as_bytes());
            tag_of(&mut scalar, 2, 5);
            #[allow(clippy::cast_possible_truncation)]
            scalar.extend_from_slice(&(value as f32).to_le_bytes());
            bytes(&mut summary, 1, &scalar);
        }
        let mut event = Vec::new();
        double(&mut event, 1, wall_time(step));
        tag_of(&mut event, 2, 0);
        varint(&mut event, step.step);
        bytes(&mut event, 5, &summary);
        record(&mut out, &event);
    }
    out
}

#[allow(clippy::cast_precision_loss)]
fn wall_time(step: &StepMetrics) -> f64 {
    step.time.as_millisecond() as f64 / 1e3
}

fn record(out: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked(&length).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked(data).to_le_bytes());
}

/// TFRecord's checksum: crc32c turned and shifted, so that data holding checksums stays safe.
fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn tag_of(out: &mut Vec<u8>, field: u64, wire: u64) {
    varint(out, field << 3 | wire);
}

fn double(out: &mut Vec<u8>, field: u64, value: f64) {
    tag_of(out, field, 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn bytes(out: &mut Vec<u8>, field: u64, data: &[u8]) {
    tag_of(out, field, 2);
    varint(out, data.len() as u64);
    out.extend_from_slice(data);
}

fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push((n & 0x7f) as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}
