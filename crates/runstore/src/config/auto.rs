//! `auto`, or a number.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A count, or `auto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AutoOr {
    /// Chosen for the machine.
    #[default]
    Auto,
    /// This many.
    Count(u32),
}

impl AutoOr {
    /// The count, or what `auto` comes to.
    #[must_use]
    pub fn or(self, auto: usize) -> usize {
        match self {
            Self::Auto => auto.max(1),
            Self::Count(n) => n as usize,
        }
    }
}

impl Serialize for AutoOr {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => s.serialize_str("auto"),
            Self::Count(n) => s.serialize_u32(*n),
        }
    }
}

impl<'de> Deserialize<'de> for AutoOr {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = AutoOr;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"auto\" or a number from 1")
            }
            fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<AutoOr, E> {
                if v == "auto" { Ok(AutoOr::Auto) } else { Err(E::invalid_value(serde::de::Unexpected::Str(v), &self)) }
            }
            fn visit_u64<E: serde::de::Error>(self, v: u64) -> Result<AutoOr, E> {
                match u32::try_from(v) {
                    Ok(n) if n > 0 => Ok(AutoOr::Count(n)),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Unsigned(v), &self)),
                }
            }
            fn visit_i64<E: serde::de::Error>(self, v: i64) -> Result<AutoOr, E> {
                match u64::try_from(v) {
                    Ok(n) => self.visit_u64(n),
                    Err(_) => Err(E::invalid_value(serde::de::Unexpected::Signed(v), &self)),
                }
            }
        }
        d.deserialize_any(Visitor)
    }
}

impl JsonSchema for AutoOr {
    fn schema_name() -> Cow<'static, str> {
        "AutoOr".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "oneOf": [{ "const": "auto" }, { "type": "integer", "minimum": 1, "maximum": u32::MAX }] })
    }
}
