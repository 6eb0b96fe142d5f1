//! Two processes prove to each other that they are ranks of one instance. Pure but for the stream; never blocks.
//!
//! ```text
//! acceptor → connector   magic(8) nonce(32)
//! connector → acceptor   magic(8) nonce(32) proof(32) length(2) claim
//! acceptor → connector   0 proof(32)   or   1 length(2) reason
//! ```
//! The claim is JSON; the connector's proof is over `connector `claim, the acceptor's over `acceptor `claim. Who doesn't
//! know the secret is told just that; the reasons of other refusals are for those who do. All of it fits the socket's
//! buffer, so a write that doesn't go at once ends the handshake.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::secret::{Nonce, PROOF_BYTES, Proof, Secret, nonce};

const MAGIC: &[u8; 8] = b"batongr1";
const GREETING_BYTES: usize = MAGIC.len() + PROOF_BYTES;
const CLAIM_BYTES_MAX: usize = 2000;
const REASON_BYTES_MAX: usize = 500;
const CLAIM_AT: usize = GREETING_BYTES + PROOF_BYTES + 2;
const ACCEPTED: u8 = 0;
const REFUSED: u8 = 1;

/// What a process knows about itself and its group.
#[derive(Debug, Clone)]
pub(super) struct Party {
    pub(super) identity: String,
    pub(super) secret: Secret,
    pub(super) rank: usize,
    pub(super) size: usize,
    /// Where it listens.
    pub(super) address: String,
    pub(super) peer_timeout: Duration,
}

/// What a connector says that it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Claim {
    pub(super) identity: String,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) size: usize,
    pub(super) address: String,
}

/// How far a handshake has come.
#[derive(Debug)]
pub(super) enum Step {
    /// It waits for the other side.
    Pending,
    /// Both sides are proved.
    Done(Claim),
    /// It is over.
    Failed(Failure),
}

/// Why a handshake is over.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The other side went away or was too slow; another try may do.
    Broken(String),
    /// The other side is none of ours.
    Foreign(String),
    /// The other side, which is ours, doesn't take this rank.
    Refused(String),
}

/// Decides on a claim that is proved.
pub(super) type Judge<'a> = &'a mut dyn FnMut(&Claim) -> Result<(), String>;

/// One handshake on one stream.
#[derive(Debug)]
pub(super) struct Handshake {
    stream: TcpStream,
    heard: Vec<u8>,
    stage: Stage,
    pub(super) deadline: Instant,
}

#[derive(Debug)]
enum Stage {
    Claim { ours: Nonce },
    Greeting { claim: String },
    Verdict { claim: String, nonces: [Nonce; 2] },
}

impl Handshake {
    /// The side that accepted the connection; it speaks first.
    pub(super) fn accept(mut stream: TcpStream, deadline: Instant) -> io::Result<Self> {
        let ours = nonce();
        write_at_once(&mut stream, &[&MAGIC[..], &ours[..]].concat())?;
        let stage = Stage::Claim { ours };
        Ok(Self::new(stream, stage, deadline))
    }

    /// The side that connected.
    pub(super) fn connect(stream: TcpStream, claim: &Claim, deadline: Instant) -> Self {
        let claim = serde_json::to_string(claim).expect("numbers and texts are JSON");
        Self::new(stream, Stage::Greeting { claim }, deadline)
    }

    fn new(stream: TcpStream, stage: Stage, deadline: Instant) -> Self {
        Self {
            stream,
            heard: Vec::new(),
            stage,
            deadline,
        }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub(super) fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// Goes on with what has come.
    pub(super) fn step(&mut self, secret: &Secret, judge: Judge<'_>) -> Step {
        self.try_step(secret, judge).unwrap_or_else(Step::Failed)
    }

    fn try_step(&mut self, secret: &Secret, judge: Judge<'_>) -> Result<Step, Failure> {
        while self.hear()? {
            match &self.stage {
                Stage::Claim { ours } => {
                    let ours = *ours;
                    return self.decide(secret, &ours, judge);
                }
                Stage::Greeting { claim } => {
                    let claim = claim.clone();
                    let nonces = [part(&self.heard, MAGIC.len()), nonce()];
                    self.prove(secret, &claim, &nonces)?;
                    self.stage = Stage::Verdict { claim, nonces };
                    self.heard.clear();
                }
                Stage::Verdict { claim, nonces } => return self.conclude(secret, claim, nonces),
            }
        }
        if Instant::now() >= self.deadline {
            return Err(Failure::Broken("it did not finish its greeting".to_owned()));
        }
        Ok(Step::Pending)
    }

    /// Reads up to what the stage needs, and never beyond. True once it is there.
    fn hear(&mut self) -> Result<bool, Failure> {
        loop {
            let wanted = self.wanted()?;
            let have = self.heard.len();
            if have == wanted {
                return Ok(true);
            }
            self.heard.resize(wanted, 0);
            let result = self.stream.read(&mut self.heard[have..]);
            self.heard.truncate(have + *result.as_ref().unwrap_or(&0));
            match result {
                Ok(0) => return Err(Failure::Broken("it closed the connection".to_owned())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Broken(error.to_string())),
            }
        }
    }

    /// Bytes that the stage needs, as far as they can be known; foreign ones are seen early.
    fn wanted(&self) -> Result<usize, Failure> {
        let have = self.heard.len();
        let length = |at: usize, limit: usize| {
            let bytes = usize::from(u16::from_le_bytes(part(&self.heard, at)));
            (bytes <= limit)
                .then_some(at + 2 + bytes)
                .ok_or_else(|| Failure::Foreign(format!("it announced {bytes} bytes")))
        };
        if let Stage::Verdict { .. } = self.stage {
            return match self.heard.first() {
                None => Ok(1),
                Some(&ACCEPTED) => Ok(1 + PROOF_BYTES),
                Some(&REFUSED) if have < 3 => Ok(3),
                Some(&REFUSED) => length(1, REASON_BYTES_MAX),
                Some(other) => Err(Failure::Foreign(format!("it answered {other:#04x}"))),
            };
        }
        let known = have.min(MAGIC.len());
        if self.heard[..known] != MAGIC[..known] {
            let said = String::from_utf8_lossy(&self.heard[..known]).into_owned();
            return Err(Failure::Foreign(format!("it said {said:?}")));
        }
        match self.stage {
            Stage::Claim { .. } if have >= CLAIM_AT => length(CLAIM_AT - 2, CLAIM_BYTES_MAX),
            Stage::Claim { .. } => Ok(CLAIM_AT),
            Stage::Greeting { .. } | Stage::Verdict { .. } => Ok(GREETING_BYTES),
        }
    }

    /// The connector's answer to the greeting.
    fn prove(&mut self, secret: &Secret, claim: &str, nonces: &[Nonce; 2]) -> Result<(), Failure> {
        let proof = secret.proof(&format!("connector {claim}"), [&nonces[0], &nonces[1]]);
        let length = u16::try_from(claim.len())
            .ok()
            .filter(|_| claim.len() <= CLAIM_BYTES_MAX)
            .ok_or_else(|| {
                let reason = format!("host and identity take {} bytes", claim.len());
                Failure::Refused(reason)
            })?;
        let answer = [
            &MAGIC[..],
            &nonces[1],
            &proof,
            &length.to_le_bytes(),
            claim.as_bytes(),
        ]
        .concat();
        write_at_once(&mut self.stream, &answer).map_err(|error| Failure::Broken(error.to_string()))
    }

    /// The acceptor's verdict.
    fn decide(&mut self, secret: &Secret, ours: &Nonce, judge: Judge<'_>) -> Result<Step, Failure> {
        let theirs: Nonce = part(&self.heard, MAGIC.len());
        let proof: Proof = part(&self.heard, GREETING_BYTES);
        let text = String::from_utf8_lossy(&self.heard[CLAIM_AT..]).into_owned();
        let verdict = if secret.verify(&proof, &format!("connector {text}"), [ours, &theirs]) {
            serde_json::from_str::<Claim>(&text)
                .map_err(|error| error.to_string())
                .and_then(|claim| judge(&claim).map(|()| claim))
        } else {
            Err("the job secrets differ".to_owned())
        };
        let answer = match &verdict {
            Ok(_) => {
                let proof = secret.proof(&format!("acceptor {text}"), [ours, &theirs]);
                [&[ACCEPTED], &proof[..]].concat()
            }
            Err(reason) => {
                let reason = &reason[..reason.floor_char_boundary(REASON_BYTES_MAX)];
                let length = u16::try_from(reason.len()).expect("the limit fits");
                [&[REFUSED], &length.to_le_bytes()[..], reason.as_bytes()].concat()
            }
        };
        write_at_once(&mut self.stream, &answer)
            .map_err(|error| Failure::Broken(error.to_string()))?;
        match verdict {
            Ok(claim) => Ok(Step::Done(claim)),
            Err(reason) => Err(Failure::Refused(reason)),
        }
    }

    /// What the connector makes of the verdict.
    fn conclude(&self, secret: &Secret, claim: &str, nonces: &[Nonce; 2]) -> Result<Step, Failure> {
        if self.heard[0] == REFUSED {
            let reason = String::from_utf8_lossy(&self.heard[3..]).into_owned();
            return Err(Failure::Refused(reason));
        }
        let proof: Proof = part(&self.heard, 1);
        let nonces = [&nonces[0], &nonces[1]];
        if !secret.verify(&proof, &format!("acceptor {claim}"), nonces) {
            return Err(Failure::Foreign("its proof is wrong".to_owned()));
        }
        let claim = serde_json::from_str(claim).expect("it was written by this side");
        Ok(Step::Done(claim))
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N]
        .try_into()
        .expect("a slice of N bytes has N bytes")
}

fn write_at_once(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    match stream.write(bytes)? {
        written if written == bytes.len() => Ok(()),
        _ => Err(io::Error::other("the connection takes no greeting")),
    }
}
