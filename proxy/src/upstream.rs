//! Calls to workers over HTTP/1.1, with a pool of idle connections per worker.
//!
//! A connection is driven by the task that uses it, not by one of its own: what arrives for a request wakes only
//! the task that serves it, and dropping that task's future closes the socket at once, which is how a worker learns
//! that its client is gone. The price is that nobody watches idle connections; they are looked at when they are
//! taken, and thrown away when they are older than a worker's keep-alive could be.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, HeaderMap};
use hyper::{Method, Request, Response, StatusCode, Uri, http};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{Fault, UpstreamFailure};
use crate::workers::Worker;

/// Idle connections older than this are not used again; workers keep theirs for 10 s (COMPAT.md §7.3).
const REUSE_AGE_MAX: Duration = Duration::from_secs(4);
/// Idle connections kept per worker.
const IDLE_COUNT_MAX: usize = 256;

type Driver = http1::Connection<TokioIo<TcpStream>, Full<Bytes>>;

/// A connection to a worker.
struct Link {
    sender: SendRequest<Full<Bytes>>,
    /// `None` once the connection is over.
    driver: Option<Pin<Box<Driver>>>,
}

impl Link {
    async fn open(worker: &Worker, connect: Duration) -> Result<Self, Fault> {
        let endpoint = worker.endpoint();
        let address = (endpoint.host.as_str(), endpoint.port);
        let stream = match timeout(connect, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) if is_exhausted(&error) => {
                return Err(Fault::Exhausted(io_text(&error)));
            }
            Ok(Err(error)) => return Err(Fault::Unreachable(io_text(&error))),
            Err(_) => {
                let waited = connect.as_secs_f64();
                return Err(Fault::Unreachable(format!(
                    "no connection within {waited:.1} s"
                )));
            }
        };
        // A failure here costs latency, not correctness.
        let _ = stream.set_nodelay(true);
        let (sender, driver) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Fault::Unreachable(error_text(&error)))?;
        Ok(Self {
            sender,
            driver: Some(Box::pin(driver)),
        })
    }

    /// Lets the connection read and write what it can.
    fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(driver) = &mut self.driver
            && driver.as_mut().poll(cx).is_ready()
        {
            // Its error, where there is one, reaches the request through hyper's own channel.
            self.driver = None;
        }
    }

    /// Whether a request may be sent on it.
    fn is_ready(&self) -> bool {
        self.driver.is_some() && self.sender.is_ready()
    }
}

/// Idle connections of one worker.
#[derive(Default)]
pub(crate) struct Pool {
    idle: Mutex<Vec<(Instant, Link)>>,
}

impl Pool {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Instant, Link)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most recently used connection that is still good.
    fn take(&self) -> Option<Link> {
        loop {
            let (since, mut link) = self.lock().pop()?;
            if since.elapsed() > REUSE_AGE_MAX {
                // Those below it are older still.
                self.clear();
                return None;
            }
            link.drive(&mut Context::from_waker(Waker::noop()));
            if link.is_ready() {
                return Some(link);
            }
        }
    }

    fn put(&self, link: Link) {
        let mut idle = self.lock();
        if idle.len() < IDLE_COUNT_MAX {
            idle.push((Instant::now(), link));
        }
    }

    /// Closes every idle connection.
    pub(crate) fn clear(&self) {
        let closed = std::mem::take(&mut *self.lock());
        drop(closed);
    }

    /// Closes idle connections that will not be used again.
    pub(crate) fn prune(&self) {
        self.lock()
            .retain(|(since, _)| since.elapsed() <= REUSE_AGE_MAX);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("idle_count", &self.lock().len())
            .finish()
    }
}

/// What is asked of a worker, and how long it may take.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// `GET` or `POST`.
    pub(crate) method: Method,
    /// Path of the worker's API.
    pub(crate) path: &'static str,
    /// Headers beside `host`.
    pub(crate) headers: HeaderMap,
    /// Body; empty for `GET`.
    pub(crate) body: Bytes,
    /// For the TCP connection.
    pub(crate) connect: Duration,
    /// For everything, from now to the last byte.
    pub(crate) total: Duration,
    /// Use a connection of its own, so that accepting is tested too.
    pub(crate) fresh: bool,
}

impl Call {
    /// A short question over a connection of its own.
    pub(crate) fn probe(path: &'static str, total: Duration) -> Self {
        Self {
            method: Method::GET,
            path,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            connect: total,
            total,
            fresh: true,
        }
    }

    fn request(&self, worker: &Worker) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = Uri::from_static(self.path);
        *request.headers_mut() = self.headers.clone();
        request.headers_mut().insert(HOST, worker.host_header());
        request
    }
}

/// A worker's answer: head, and a body that is still arriving.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Status and headers.
    pub(crate) head: http::response::Parts,
    /// The rest.
    pub(crate) body: AnswerBody,
}

/// Sends `call` to `worker` and waits for the head of the answer. A worker that cannot be reached is marked so.
pub(crate) async fn call(worker: &Arc<Worker>, call: &Call) -> Result<Answer, UpstreamFailure> {
    let outcome = exchange(worker, call).await;
    outcome.map_err(|fault| {
        match &fault {
            Fault::Unreachable(reason) => worker.mark_unreachable(reason),
            Fault::Exhausted(_) => {}
            Fault::Lost(_) | Fault::TimedOut { .. } | Fault::Status(_) | Fault::BadAnswer(_) => {
                worker.suspect();
            }
        }
        UpstreamFailure {
            worker: worker.clone(),
            fault,
        }
    })
}

/// Asks a worker something small, without any effect on what is known of it: the status, and at most `limit` bytes.
pub(crate) async fn ask(
    worker: &Arc<Worker>,
    call: &Call,
    limit: usize,
) -> Result<(StatusCode, Bytes), Fault> {
    let mut answer = exchange(worker, call).await?;
    let body = answer.body.collect(limit).await?;
    Ok((answer.head.status, body))
}

/// As [`call`], without any effect on what is known of the worker.
async fn exchange(worker: &Arc<Worker>, call: &Call) -> Result<Answer, Fault> {
    let started = Instant::now();
    let deadline = started + call.total;
    let mut request = call.request(worker);
    loop {
        let reused = if call.fresh { None } else { worker.pool.take() };
        let is_reused = reused.is_some();
        let mut link = match reused {
            Some(link) => link,
            None => Link::open(worker, call.connect.min(call.total)).await?,
        };
        let Ok(answer) = timeout_at(deadline, send(&mut link, request)).await else {
            return Err(Fault::TimedOut {
                waited_for: "answer",
                after: started.elapsed(),
            });
        };
        match answer {
            Ok(response) => return Ok(Answer::new(worker.clone(), link, response, deadline)),
            Err(mut error) => match error.take_message() {
                // The worker closed an idle connection; nothing of the request was sent.
                Some(unsent) if is_reused => request = unsent,
                _ => return Err(Fault::Lost(error_text(error.error()))),
            },
        }
    }
}

type SendError = hyper::client::conn::TrySendError<Request<Full<Bytes>>>;

async fn send(
    link: &mut Link,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, SendError> {
    let mut answer = pin!(link.sender.try_send_request(request));
    poll_fn(|cx| {
        link.drive(cx);
        answer.as_mut().poll(cx)
    })
    .await
}

impl Answer {
    fn new(
        worker: Arc<Worker>,
        link: Link,
        response: Response<Incoming>,
        deadline: Instant,
    ) -> Self {
        let (head, incoming) = response.into_parts();
        Self {
            head,
            body: AnswerBody {
                worker,
                link: Some(link),
                incoming,
                deadline,
            },
        }
    }
}

/// The body of a worker's answer. Dropping it before its end closes the connection.
pub(crate) struct AnswerBody {
    worker: Arc<Worker>,
    link: Option<Link>,
    incoming: Incoming,
    deadline: Instant,
}

impl AnswerBody {
    pub(crate) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    /// When the whole call must be over.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The next piece as it came from the socket; `None` at the end.
    pub(crate) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Fault>>> {
        loop {
            // What the connection has read already is handed over before it reads more.
            let frame = match Pin::new(&mut self.incoming).poll_frame(cx) {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    if let Some(link) = &mut self.link {
                        link.drive(cx);
                    }
                    match Pin::new(&mut self.incoming).poll_frame(cx) {
                        Poll::Ready(frame) => frame,
                        Poll::Pending => return Poll::Pending,
                    }
                }
            };
            match frame {
                Some(Ok(frame)) => {
                    // Trailers are not relayed.
                    if let Ok(data) = frame.into_data()
                        && !data.is_empty()
                    {
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
                Some(Err(error)) => {
                    self.link = None;
                    return Poll::Ready(Some(Err(Fault::Lost(error_text(&error)))));
                }
                None => {
                    self.release(cx);
                    return Poll::Ready(None);
                }
            }
        }
    }

    /// Gives the connection back for the next request.
    fn release(&mut self, cx: &mut Context<'_>) {
        if let Some(mut link) = self.link.take() {
            link.drive(cx);
            if link.is_ready() {
                self.worker.pool.put(link);
            }
        }
    }

    /// Waits for the next piece until the call's deadline.
    pub(crate) async fn next(&mut self, waited_for: &'static str) -> Result<Option<Bytes>, Fault> {
        let started = Instant::now();
        let deadline = self.deadline;
        match timeout_at(deadline, poll_fn(|cx| self.poll_data(cx))).await {
            Ok(None) => Ok(None),
            Ok(Some(piece)) => piece.map(Some),
            Err(_) => Err(Fault::TimedOut {
                waited_for,
                after: started.elapsed(),
            }),
        }
    }

    /// The whole body, at most `limit` bytes.
    pub(crate) async fn collect(&mut self, limit: usize) -> Result<Bytes, Fault> {
        let Some(first) = self.next("rest of the answer").await? else {
            return Ok(Bytes::new());
        };
        let Some(second) = self.next("rest of the answer").await? else {
            return Ok(first);
        };
        let mut whole = BytesMut::with_capacity(2 * (first.len() + second.len()));
        whole.extend_from_slice(&first);
        let mut piece = Some(second);
        while let Some(bytes) = piece {
            if whole.len() + bytes.len() > limit {
                return Err(Fault::BadAnswer(format!(
                    "an answer of more than {limit} bytes"
                )));
            }
            whole.extend_from_slice(&bytes);
            piece = self.next("rest of the answer").await?;
        }
        Ok(whole.freeze())
    }
}

impl fmt::Debug for AnswerBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnswerBody")
            .field("worker", &self.worker.name())
            .finish_non_exhaustive()
    }
}

/// Whether the error is about this process or machine: no descriptor or no local port is left.
fn is_exhausted(error: &std::io::Error) -> bool {
    use nix::errno::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(
        errno,
        Some(Errno::EMFILE | Errno::ENFILE | Errno::EADDRNOTAVAIL | Errno::ENOBUFS)
    )
}

/// A hyper error with its cause, which holds what the operating system said.
fn error_text(error: &hyper::Error) -> String {
    let source = std::error::Error::source(error);
    match source {
        Some(source) => match source.downcast_ref::<std::io::Error>() {
            Some(io) => format!("{error}: {}", io_text(io)),
            None => format!("{error}: {source}"),
        },
        None => error.to_string(),
    }
}

/// An I/O error in lower case and without the number that the standard library appends.
fn io_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use super::*;

    #[test]
    fn lack_of_descriptors_is_not_the_workers_fault() {
        assert!(is_exhausted(&Error::from_raw_os_error(24)));
        assert!(!is_exhausted(&Error::from(ErrorKind::ConnectionRefused)));
        assert_eq!(
            io_text(&Error::from_raw_os_error(24)),
            "too many open files"
        );
    }
}
