//! The job's secret, and proofs of knowing it. Pure: the sockets are the callers'.
//!
//! Two sides exchange nonces, then each proves the secret over both nonces and over what it claims to be (HMAC-SHA-256,
//! RFC 2104), so neither a foreign process on the port nor one of another job or epoch gets any further. What follows
//! on the connection is not encrypted.

use std::fmt::{self, Debug};

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Bytes of a secret, a nonce and a proof.
pub const PROOF_BYTES: usize = 32;

/// Random bytes that one side contributes to a handshake, so that a recorded one is worth nothing.
pub type Nonce = [u8; PROOF_BYTES];

/// Knowledge of a secret, shown for one handshake.
pub type Proof = [u8; PROOF_BYTES];

/// What all processes of one job share. It is never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; PROOF_BYTES]);

impl Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Why a text is no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a job secret is {} hexadecimal digits, this one has {digits} characters", 2 * PROOF_BYTES)]
pub struct SecretError {
    digits: usize,
}

impl Secret {
    /// A new secret from the system's random numbers. Panics where the system has none.
    #[must_use]
    pub fn generate() -> Self {
        Self(nonce())
    }

    /// Reads the form of [`Secret::to_hex`].
    ///
    /// # Errors
    /// When it is not 64 hexadecimal digits. The text itself is kept out of the message.
    pub fn from_hex(text: &str) -> Result<Self, SecretError> {
        let wrong = || SecretError {
            digits: text.chars().count(),
        };
        let digits: Vec<u8> = text
            .chars()
            .map(|digit| {
                digit
                    .to_digit(16)
                    .and_then(|value| u8::try_from(value).ok())
            })
            .collect::<Option<_>>()
            .ok_or_else(wrong)?;
        let bytes: Vec<u8> = digits
            .chunks(2)
            .map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit))
            .collect();
        if digits.len() != 2 * PROOF_BYTES {
            return Err(wrong());
        }
        bytes.try_into().map(Self).map_err(|_| wrong())
    }

    /// 64 hexadecimal digits, for the environment of a child.
    #[must_use]
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The proof of one side. `claim` names the side and what it claims to be; `nonces` are the acceptor's, then the
    /// connector's.
    #[must_use]
    pub fn proof(&self, claim: &str, nonces: [&Nonce; 2]) -> Proof {
        self.mac(claim, nonces).finalize().into_bytes().into()
    }

    /// Whether a proof is right; takes the same time wherever it is wrong.
    #[must_use]
    pub fn verify(&self, proof: &Proof, claim: &str, nonces: [&Nonce; 2]) -> bool {
        self.mac(claim, nonces).verify_slice(proof).is_ok()
    }

    fn mac(&self, claim: &str, nonces: [&Nonce; 2]) -> Hmac<Sha256> {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        // Both nonces have a fixed length, so the claim cannot run into them.
        mac.update(nonces[0]);
        mac.update(nonces[1]);
        mac.update(claim.as_bytes());
        mac
    }
}

/// Fresh random bytes. Panics where the system has none.
#[must_use]
pub fn nonce() -> Nonce {
    let mut bytes = [0; PROOF_BYTES];
    getrandom::fill(&mut bytes).expect("the system has random numbers");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_survives_its_text() {
        let secret = Secret::generate();
        assert_eq!(Secret::from_hex(&secret.to_hex()), Ok(secret));
    }

    #[test]
    fn a_text_that_is_no_secret_is_refused_and_not_repeated() {
        for text in ["", "abc", &"g".repeat(64), &"0".repeat(63), &"0".repeat(66)] {
            let error = Secret::from_hex(text).unwrap_err().to_string();
            assert!(error.contains("64 hexadecimal digits"), "{error}");
        }
    }

    #[test]
    fn a_proof_holds_for_its_claim_nonces_and_secret_only() {
        let (ours, other) = (Secret::generate(), Secret::generate());
        let (a, b) = (nonce(), nonce());
        let proof = ours.proof("rank 1", [&a, &b]);
        assert!(ours.verify(&proof, "rank 1", [&a, &b]));
        assert!(!ours.verify(&proof, "rank 2", [&a, &b]));
        assert!(!ours.verify(&proof, "rank 1", [&b, &a]));
        assert!(!other.verify(&proof, "rank 1", [&a, &b]));
    }

    #[test]
    fn debugging_shows_nothing() {
        assert_eq!(format!("{:?}", Secret::generate()), "Secret(..)");
    }
}
