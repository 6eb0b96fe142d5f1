//! One definition per section of a document: [`section!`] turns a table of keys into the raw struct, its
//! reader and the rows from which schema, documentation and `explain` are made.
//!
//! A row states name, type, default as text, and documentation; the rows under `unserved` also state what
//! happens to an option that this version does not act on. Nothing else in the crate lists keys.

pub(crate) mod kind;
pub(crate) mod read;

use crate::error::Place;
use crate::section::read::{Findings, MapReader};
use crate::yaml::Node;

/// What a value may be, as data: for checks, schemas and "expected …" texts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Shape {
    Flag,
    /// Text that is not empty.
    Text,
    /// Text that may be empty.
    FreeText,
    Whole {
        min: u64,
        max: u64,
    },
    /// A number above 0 and at most 1.
    Share,
    /// A number of seconds above 0.
    Seconds,
    /// `host:port`.
    Endpoint,
    OneOf(fn() -> Vec<&'static str>),
    List(&'static Self),
    Section(&'static SectionTable),
    /// A mapping from names to scalars.
    TextMap,
    Anything,
}

/// What is done with an option.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Treatment {
    /// It works.
    Served,
    /// It has no effect here, and nobody needs to be told.
    Quiet(&'static str),
    /// It has no effect here; it is listed in a warning.
    Ignored(&'static str),
    /// Ignoring it would change results or drop a feature; any other value than the default is an error.
    Refused(&'static str),
}

/// One key of a section.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FieldRow {
    pub(crate) name: &'static str,
    /// Other spellings that are accepted.
    pub(crate) also: &'static [&'static str],
    pub(crate) shape: Shape,
    /// Checks a value that nobody acts on; records what is wrong.
    pub(crate) check: fn(&Node, &str, &mut Findings) -> bool,
    /// The default, as YAML.
    pub(crate) default: &'static str,
    /// Raw text of the `///` lines.
    pub(crate) doc: &'static str,
    pub(crate) treatment: Treatment,
}

/// Options of existing engine files that share one treatment.
#[derive(Debug)]
pub(crate) struct OptionGroup {
    pub(crate) names: &'static [&'static str],
    pub(crate) treatment: Treatment,
}

/// The keys of one section.
#[derive(Debug)]
pub(crate) struct SectionTable {
    /// Name in schemas and texts.
    pub(crate) name: &'static str,
    /// Raw text of the `///` lines.
    pub(crate) about: &'static str,
    /// Keys with a field in the raw struct.
    pub(crate) served: &'static [FieldRow],
    /// Keys that are read elsewhere, and keys that nobody acts on.
    pub(crate) unserved: &'static [FieldRow],
    pub(crate) groups: &'static [OptionGroup],
}

impl SectionTable {
    pub(crate) fn rows(&self) -> impl Iterator<Item = &'static FieldRow> + use<> {
        self.served.iter().chain(self.unserved)
    }

    pub(crate) fn row(&self, name: &str) -> Option<&'static FieldRow> {
        self.rows()
            .find(|row| row.name == name || row.also.contains(&name))
    }

    pub(crate) fn group(&self, name: &str) -> Option<&'static OptionGroup> {
        self.groups.iter().find(|group| group.names.contains(&name))
    }

    /// Every key that is accepted, canonical spellings first.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> + use<> {
        let also = self.rows().flat_map(|row| row.also.iter().copied());
        let grouped = self
            .groups
            .iter()
            .flat_map(|group| group.names.iter().copied());
        self.rows().map(|row| row.name).chain(also).chain(grouped)
    }

    pub(crate) fn knows(&self, name: &str) -> bool {
        self.row(name).is_some() || self.group(name).is_some()
    }
}

impl FieldRow {
    /// The documentation as one paragraph.
    pub(crate) fn doc_text(&self) -> String {
        paragraph(self.doc)
    }
}

/// The raw text of `///` lines as one paragraph.
pub(crate) fn paragraph(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A value that was given, and where.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Located<T> {
    pub(crate) value: T,
    pub(crate) place: Option<Place>,
    pub(crate) path: String,
}

/// A section in its raw form, in which every field may be missing.
pub(crate) trait Section: Sized {
    const TABLE: &'static SectionTable;

    /// Takes this section's keys out of a mapping; keys that are left over are the caller's to judge.
    fn read(reader: &mut MapReader<'_>) -> Self;
}

/// The key of a field: its own name unless another is given.
macro_rules! key_of {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident, $name:literal) => {
        $name
    };
}

/// Defines a section: `field ["other spelling"] as "key": Kind = "default";`. Values under `checked` are
/// checked like the others, but are read elsewhere and have no field in the raw struct.
macro_rules! section {
    (
        $(#[doc = $about:literal])+
        $raw:ident $title:literal {
            $(
                $(#[doc = $doc:literal])+
                $field:ident $([$($also:literal),+])? $(as $key:literal)? : $kind:ty = $default:literal;
            )*
        }
        $(checked {
            $(
                $(#[doc = $cdoc:literal])+
                $cfield:ident $(as $ckey:literal)? : $ckind:ty = $cdefault:literal;
            )*
        })?
        unserved {
            $(
                $(#[doc = $udoc:literal])+
                $ufield:ident $([$($ualso:literal),+])? : $ukind:ty = $udefault:literal, $treatment:ident $why:literal;
            )*
        }
        groups $groups:expr;
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Default)]
        pub(crate) struct $raw {
            $(
                $(#[doc = $doc])+
                pub(crate) $field: Option<$crate::section::Located<<$kind as $crate::section::kind::Kind>::Value>>,
            )*
        }

        impl $crate::section::Section for $raw {
            const TABLE: &'static $crate::section::SectionTable = &$crate::section::SectionTable {
                name: $title,
                about: concat!($($about, "\n"),+),
                served: &[$(
                    $crate::section::FieldRow {
                        name: $crate::section::key_of!($field $(, $key)?),
                        also: &[$($($also),+)?],
                        shape: <$kind as $crate::section::kind::Kind>::SHAPE,
                        check: $crate::section::kind::is_good::<$kind>,
                        default: $default,
                        doc: concat!($($doc, "\n"),+),
                        treatment: $crate::section::Treatment::Served,
                    },
                )*],
                unserved: &[$($(
                    $crate::section::FieldRow {
                        name: $crate::section::key_of!($cfield $(, $ckey)?),
                        also: &[],
                        shape: <$ckind as $crate::section::kind::Kind>::SHAPE,
                        check: $crate::section::kind::is_good::<$ckind>,
                        default: $cdefault,
                        doc: concat!($($cdoc, "\n"),+),
                        treatment: $crate::section::Treatment::Served,
                    },
                )*)?
                $(
                    $crate::section::FieldRow {
                        name: stringify!($ufield),
                        also: &[$($($ualso),+)?],
                        shape: <$ukind as $crate::section::kind::Kind>::SHAPE,
                        check: $crate::section::kind::is_good::<$ukind>,
                        default: $udefault,
                        doc: concat!($($udoc, "\n"),+),
                        treatment: $crate::section::Treatment::$treatment($why),
                    },
                )*],
                groups: $groups,
            };

            fn read(reader: &mut $crate::section::read::MapReader<'_>) -> Self {
                let found = Self {
                    $(
                        $field: reader.field::<$kind>(
                            Self::TABLE,
                            $crate::section::key_of!($field $(, $key)?),
                        ),
                    )*
                };
                reader.judge_unserved(Self::TABLE);
                found
            }
        }
    };
}

pub(crate) use {key_of, section};
