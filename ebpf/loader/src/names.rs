//! Roles and metrics as text: by their names.

macro_rules! by_name {
    ($module:ident, $of:ty) => {
        /// For `#[serde(with)]`.
        pub mod $module {
            use serde::de::Error;
            use serde::{Deserialize, Deserializer, Serializer};

            /// Writes the name.
            ///
            /// # Errors
            ///
            /// Those of `to`.
            pub fn serialize<S: Serializer>(value: &$of, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(value.name())
            }

            /// Reads it.
            ///
            /// # Errors
            ///
            /// Those of `from`, and for a name that is not known.
            pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<$of, D::Error> {
                let name = String::deserialize(from)?;
                <$of>::from_name(&name).ok_or_else(|| D::Error::custom(format!("no {name}")))
            }
        }
    };
}

by_name!(role, ebpf_common::Role);
by_name!(metric, ebpf_common::Metric);
