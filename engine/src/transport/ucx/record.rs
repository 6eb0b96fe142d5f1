//! What travels between two processes that use UCX: the address of a worker, and the key of an arena. Pure.
//!
//! UCX reads its own addresses and keys without doubting them, so each record carries a checksum: what a broken wire or
//! another program made does not reach UCX. It is no proof against someone who means harm; who that may be is settled
//! by whoever carries the records.

use xxhash_rust::xxh3::xxh3_64;

/// First bytes of a record, by kind.
const ADDRESS: [u8; 4] = *b"UCXa";
const KEY: [u8; 4] = *b"UCXm";

const CHECKSUM_BYTES: usize = 8;

/// A record is not one, or damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum RecordError {
    #[error("it is not of UCX")]
    Kind,
    #[error("its checksum does not match")]
    Checksum,
    #[error("it is too short")]
    Short,
}

/// Bytes of a probe.
pub(super) const PROBE_BYTES: usize = 16;

/// Where a process's memory is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddressRecord {
    /// Major and minor version of its UCX.
    pub(super) version: (u16, u16),
    /// What is read first, as it is there.
    pub(super) probe: [u8; PROBE_BYTES],
    /// The key to it.
    pub(super) probe_key: Vec<u8>,
    /// In UCX's own form.
    pub(super) worker: Vec<u8>,
}

/// What an arena is read with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyRecord {
    /// Where the arena begins in its process.
    pub(super) base: u64,
    /// Its length.
    pub(super) bytes: u64,
    /// Whether it is memory of a GPU.
    pub(super) on_gpu: bool,
    /// In UCX's own form.
    pub(super) key: Vec<u8>,
}

impl AddressRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        let (major, minor) = self.version;
        let key_bytes = self.probe_key.len() as u64;
        let parts: [&[u8]; 6] = [
            &major.to_le_bytes(),
            &minor.to_le_bytes(),
            &self.probe,
            &key_bytes.to_le_bytes(),
            &self.probe_key,
            &self.worker,
        ];
        sealed(ADDRESS, &parts)
    }

    pub(super) fn decode(record: &[u8]) -> Result<Self, RecordError> {
        let body = opened(ADDRESS, record)?;
        let (major, body) = body.split_first_chunk().ok_or(RecordError::Short)?;
        let (minor, body) = body.split_first_chunk().ok_or(RecordError::Short)?;
        let (probe, body) = body.split_first_chunk().ok_or(RecordError::Short)?;
        let (key_bytes, body) = body.split_first_chunk().ok_or(RecordError::Short)?;
        let key_bytes = usize::try_from(u64::from_le_bytes(*key_bytes)).ok();
        let split = key_bytes.and_then(|bytes| body.split_at_checked(bytes));
        let (probe_key, worker) = split.ok_or(RecordError::Short)?;
        Ok(Self {
            version: (u16::from_le_bytes(*major), u16::from_le_bytes(*minor)),
            probe: *probe,
            probe_key: probe_key.to_vec(),
            worker: worker.to_vec(),
        })
    }
}

impl KeyRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        let parts: [&[u8]; 4] = [
            &self.base.to_le_bytes(),
            &self.bytes.to_le_bytes(),
            &[u8::from(self.on_gpu)],
            &self.key,
        ];
        sealed(KEY, &parts)
    }

    pub(super) fn decode(record: &[u8]) -> Result<Self, RecordError> {
        let body = opened(KEY, record)?;
        let (base, body) = body.split_first_chunk().ok_or(RecordError::Short)?;
        let (bytes, body) = body.split_first_chunk().ok_or(RecordError::Short)?;
        let ([on_gpu], key) = body.split_first_chunk().ok_or(RecordError::Short)?;
        Ok(Self {
            on_gpu: *on_gpu != 0,
            base: u64::from_le_bytes(*base),
            bytes: u64::from_le_bytes(*bytes),
            key: key.to_vec(),
        })
    }
}

fn sealed(kind: [u8; 4], parts: &[&[u8]]) -> Vec<u8> {
    let mut record = kind.to_vec();
    for part in parts {
        record.extend_from_slice(part);
    }
    let checksum = xxh3_64(&record);
    record.extend_from_slice(&checksum.to_le_bytes());
    record
}

fn opened(kind: [u8; 4], record: &[u8]) -> Result<&[u8], RecordError> {
    let body = record.strip_prefix(&kind).ok_or(RecordError::Kind)?;
    let (body, checksum) = body
        .split_last_chunk::<CHECKSUM_BYTES>()
        .ok_or(RecordError::Short)?;
    let sealed = &record[..record.len() - CHECKSUM_BYTES];
    if xxh3_64(sealed) != u64::from_le_bytes(*checksum) {
        return Err(RecordError::Checksum);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> AddressRecord {
        AddressRecord {
            version: (1, 13),
            probe: [3; PROBE_BYTES],
            probe_key: vec![5; 30],
            worker: vec![7; 40],
        }
    }

    fn key() -> KeyRecord {
        KeyRecord {
            base: 0x7f00_0000_0000,
            bytes: 1 << 30,
            on_gpu: true,
            key: vec![9; 25],
        }
    }

    #[test]
    fn records_come_back_as_they_went() {
        assert_eq!(AddressRecord::decode(&address().encode()), Ok(address()));
        assert_eq!(KeyRecord::decode(&key().encode()), Ok(key()));
    }

    #[test]
    fn any_changed_or_missing_byte_is_found() {
        let record = key().encode();
        for at in 0..record.len() {
            let mut changed = record.clone();
            changed[at] ^= 1;
            assert!(KeyRecord::decode(&changed).is_err(), "byte {at}");
            assert!(KeyRecord::decode(&record[..at]).is_err(), "{at} bytes");
        }
        assert_eq!(AddressRecord::decode(&record), Err(RecordError::Kind));
        let mut long = address();
        long.probe_key.clear();
        let mut body = long.encode();
        body.truncate(body.len() - CHECKSUM_BYTES);
        body[24] = 41;
        let long = sealed(ADDRESS, &[&body[4..]]);
        assert_eq!(AddressRecord::decode(&long), Err(RecordError::Short));
        let empty = sealed(KEY, &[]);
        assert_eq!(KeyRecord::decode(&empty), Err(RecordError::Short));
    }
}
