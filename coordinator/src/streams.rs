//! The gRPC streams of nodes and ranks: what comes up one becomes an [`Input`] of the task that owns the run, and what that task
//! orders goes down again.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use sgcl_proto::MAX_MESSAGE_BYTES;
use sgcl_proto::v1::coordinator_server::{Coordinator as Service, CoordinatorServer};
use sgcl_proto::v1::{self, NodeEvent, NodeOrder, RankEvent, RankOrder, node_event, rank_event};
use sgcl_runstore::Commit;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::metadata::MetadataMap;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument as _, Span, info_span};

use crate::machine::{Event, Place};
use crate::metrics::{NODE_STREAMS, RANK_STREAMS};
use crate::switchboard::Switchboard;
use crate::trust::Door;

/// Streams of one connection: a supervisor or a rank holds one, and may open another before the last one's end is noticed.
const STREAMS: u32 = 8;
/// Silence after which a connection counts as broken: twice this.
const HEARTBEAT: Duration = Duration::from_millis(1500);

/// A stream's way back, and its number: a node whose line broke comes with a new one, maybe before the old one's end is noticed.
pub(crate) struct Line<T> {
    pub(crate) number: u64,
    pub(crate) orders: mpsc::UnboundedSender<Result<T, Status>>,
}

/// What the streams tell the one task that owns the state.
pub(crate) enum Input {
    Event(Event),
    /// A node's stream: one that joins, or comes back with the ranks and attempts that it has.
    Node {
        node: String,
        slot: u32,
        address: String,
        ranks: Vec<(u32, u32)>,
        line: Line<NodeOrder>,
    },
    /// The end of a node's stream, which may be an old one.
    NodeGone(String, u64),
    Rank(Place, mpsc::UnboundedSender<Result<RankOrder, Status>>),
    Progress(Place, v1::Progress),
    Parts {
        generation: u64,
        place: Place,
        parts: v1::PartsWritten,
    },
    AskCommit(Place),
    Found(Place, Result<Option<Commit>>),
    Committed {
        generation: u64,
        step: u64,
        result: Result<Commit>,
    },
}

/// Serves the streams of every run on the board to whoever gets through the door, until told to end.
///
/// # Errors
/// The listener breaks.
pub async fn listen(
    board: Switchboard,
    door: Door,
    listener: TcpListener,
    end: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let connections = door.connections(listener);
    let streams = Streams { board, door, lines: AtomicU64::new(0) };
    match connections {
        Ok(connections) => serve(streams, connections, end).await,
        Err(listener) => serve(streams, TcpListenerStream::new(listener), end).await,
    }
}

async fn serve<C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static>(
    streams: Streams,
    connections: impl Stream<Item = std::io::Result<C>> + Send,
    end: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let service = CoordinatorServer::new(streams)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(HEARTBEAT))
        .http2_keepalive_timeout(Some(HEARTBEAT))
        .max_concurrent_streams(Some(STREAMS))
        .add_service(service)
        .serve_with_incoming_shutdown(connections, end)
        .await
}

/// The gRPC side: streams to inputs.
struct Streams {
    board: Switchboard,
    door: Door,
    /// Streams so far.
    lines: AtomicU64,
}

impl Streams {
    async fn send(inputs: &mpsc::Sender<Input>, input: Input) -> bool {
        inputs.send(input).await.is_ok()
    }
}

/// The first message of a stream must say who speaks, and of which run.
fn hello<T>(first: Option<T>, run: impl Fn(&T) -> Option<&str>) -> Result<(T, String), Status> {
    let first = first.ok_or_else(|| Status::invalid_argument("the stream ended before its hello"))?;
    let run = run(&first).ok_or_else(|| Status::invalid_argument("the first message must be a hello"))?.to_owned();
    Ok((first, run))
}

/// A stream, as part of the trace that its other end names.
fn span(rpc: &'static str, metadata: &MetadataMap, run: &str, node: &str) -> Span {
    let span = info_span!("stream", otel.name = rpc, otel.kind = "server", rpc.system = "grpc", run, node);
    let named = metadata.get(sgcl_telemetry::HEADER).and_then(|value| value.to_str().ok());
    if let Some(parent) = named.and_then(|text| text.parse().ok()) {
        sgcl_telemetry::follow(&span, &parent);
    }
    span
}

#[tonic::async_trait]
impl Service for Streams {
    type JoinStream = UnboundedReceiverStream<Result<NodeOrder, Status>>;
    type RankStream = UnboundedReceiverStream<Result<RankOrder, Status>>;

    async fn join(&self, request: Request<Streaming<NodeEvent>>) -> Result<Response<Self::JoinStream>, Status> {
        let (metadata, _, mut events) = request.into_parts();
        let (first, run) = hello(events.message().await?, |first| match &first.event {
            Some(node_event::Event::Hello(hello)) => Some(&hello.run),
            _ => None,
        })?;
        let Some(node_event::Event::Hello(v1::NodeHello { node, address, slot, ranks, .. })) = first.event else {
            return Err(Status::invalid_argument("the first message must be a hello"));
        };
        self.door.admit(&metadata, &run, &node).await?;
        let inputs = self.board.find(&run)?;
        let (orders, out) = mpsc::unbounded_channel();
        let number = self.lines.fetch_add(1, Ordering::Relaxed);
        let line = Line { number, orders };
        let span = span("sgcl.v1.Coordinator/Join", &metadata, &run, &node);
        let open = NODE_STREAMS.one();
        let work = async move {
            let _open = open;
            let ranks = ranks.into_iter().map(|rank| (rank.local_rank, rank.attempt)).collect();
            let mut known = Self::send(&inputs, Input::Node { node: node.clone(), slot, address, ranks, line }).await;
            while let (true, Ok(Some(message))) = (known, events.message().await) {
                let event = match message.event {
                    Some(node_event::Event::Exited(e)) => Event::RankExited {
                        place: (node.clone(), e.local_rank),
                        attempt: e.attempt,
                        code: e.code,
                        last_words: e.last_words,
                    },
                    Some(node_event::Event::Preempting(e)) => {
                        Event::Preempting { node: node.clone(), deadline: Duration::from_secs(e.deadline_s.into()) }
                    }
                    Some(node_event::Event::Hello(_)) | None => continue,
                };
                known = Self::send(&inputs, Input::Event(event)).await;
            }
            Self::send(&inputs, Input::NodeGone(node, number)).await;
        };
        tokio::spawn(work.instrument(span));
        Ok(Response::new(UnboundedReceiverStream::new(out)))
    }

    async fn rank(&self, request: Request<Streaming<RankEvent>>) -> Result<Response<Self::RankStream>, Status> {
        let (metadata, _, mut events) = request.into_parts();
        let (first, run) = hello(events.message().await?, |first| match &first.event {
            Some(rank_event::Event::Hello(hello)) => Some(&hello.run),
            _ => None,
        })?;
        let Some(rank_event::Event::Hello(v1::RankHello { node, local_rank, attempt, member, .. })) = first.event
        else {
            return Err(Status::invalid_argument("the first message must be a hello"));
        };
        self.door.admit(&metadata, &run, &node).await?;
        let inputs = self.board.find(&run)?;
        let (orders, out) = mpsc::unbounded_channel();
        let span = span("sgcl.v1.Coordinator/Rank", &metadata, &run, &node);
        let open = RANK_STREAMS.one();
        let work = async move {
            let _open = open;
            let place = (node, local_rank);
            if !Self::send(&inputs, Input::Rank(place.clone(), orders)).await {
                return;
            }
            if let Some(v1::Membership { generation, rank, nodes }) = member {
                let (place, world) = (place.clone(), u32::try_from(nodes.len()).unwrap_or(u32::MAX));
                let returned = Event::RankReturned { place, attempt, generation, rank, world };
                if !Self::send(&inputs, Input::Event(returned)).await {
                    return;
                }
            }
            // A stream that ends says nothing: the supervisor reports how the process ended.
            while let Ok(Some(RankEvent { generation, event: Some(event) })) = events.message().await {
                let place = place.clone();
                let input = match event {
                    rank_event::Event::Hello(_) => continue,
                    rank_event::Event::Ready(ready) => {
                        let broken = Some(ready.broken).filter(|broken| !broken.is_empty());
                        Input::Event(Event::RankReady { place, attempt, generation, broken })
                    }
                    rank_event::Event::Store(store) => {
                        Input::Event(Event::StoreListening { generation, port: store.port })
                    }
                    rank_event::Event::AskCommit(_) => Input::AskCommit(place),
                    rank_event::Event::Reunited(v1::Reunited { step, from_commit }) => {
                        Input::Event(Event::Reunited { generation, place, step, from_commit })
                    }
                    rank_event::Event::Progress(progress) => {
                        let alive = Event::Progress { generation, step: progress.step };
                        if !Self::send(&inputs, Input::Event(alive)).await {
                            break;
                        }
                        Input::Progress(place, progress)
                    }
                    rank_event::Event::Parts(parts) => Input::Parts { generation, place, parts },
                    rank_event::Event::Finished(finished) => {
                        Input::Event(Event::RankFinished { generation, place, stopped: finished.stopped })
                    }
                    rank_event::Event::Failed(failed) => Input::Event(Event::RankFailed {
                        place,
                        attempt,
                        message: failed.message,
                        code: failed.exit_code,
                    }),
                };
                if !Self::send(&inputs, input).await {
                    break;
                }
            }
        };
        tokio::spawn(work.instrument(span));
        Ok(Response::new(UnboundedReceiverStream::new(out)))
    }
}
