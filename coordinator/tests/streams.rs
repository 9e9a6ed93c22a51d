//! What nodes are told over their streams: over a real socket, with a launcher that starts nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sgcl_coordinator::launcher::Ended;
use sgcl_coordinator::{Coordinator, Door, Launcher, RunView, Switchboard, listen};
use sgcl_patchset::Store;
use sgcl_proto::v1::coordinator_client::CoordinatorClient;
use sgcl_proto::v1::{NodeEvent, NodeHello, NodeOrder, node_event, node_order};
use sgcl_runstore::{RunConfig, RunName, Spec};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Streaming};

/// Nodes come by themselves here.
struct Nobody;

impl Launcher for Nobody {
    fn launch(&self, _: u32, _: u32, _: &str, _: mpsc::UnboundedSender<Ended>) -> std::io::Result<()> {
        Ok(())
    }

    fn adopt(&self, _: mpsc::UnboundedSender<Ended>) -> Vec<(u32, u32)> {
        Vec::new()
    }

    fn discard(&self, _: u32, _: u32) {}

    fn kill_all(&self) {}
}

/// A node's end of its stream.
struct Node {
    /// Held, or the stream ends.
    _events: mpsc::UnboundedSender<NodeEvent>,
    orders: Streaming<NodeOrder>,
}

impl Node {
    /// Joins, once the run is coordinated at `url`.
    async fn join(url: &str, node: &str, address: &str) -> Self {
        let mut client = CoordinatorClient::connect(url.to_owned()).await.unwrap();
        let hello = NodeHello { run: "r".into(), node: node.into(), address: address.into(), ..NodeHello::default() };
        let hello = NodeEvent { event: Some(node_event::Event::Hello(hello)) };
        for _ in 0..500 {
            let (events, stream) = mpsc::unbounded_channel();
            events.send(hello.clone()).unwrap();
            match client.join(UnboundedReceiverStream::new(stream)).await {
                Ok(orders) => return Self { _events: events, orders: orders.into_inner() },
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("nobody coordinates the run");
    }

    /// The next order; none once the coordinator has closed the line.
    async fn told(&mut self) -> Option<node_order::Order> {
        let next = timeout(Duration::from_secs(30), self.orders.message()).await.expect("an order comes");
        next.unwrap().map(|order| order.order.unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_pod_of_a_nodes_name_is_sent_home_and_the_first_keeps_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = Store::open(&folder.path().display().to_string()).unwrap();
    let run = RunName::new("r").unwrap();
    let store = run.store(&bucket);
    let spec = Spec::new(run, "patches", "id", 1, 1, 1, RunConfig::default(), Timestamp::now());
    spec.create(&store).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let board = Switchboard::default();
    let _serving =
        AbortOnDropHandle::new(tokio::spawn(listen(board.clone(), Door::open(), listener, std::future::pending())));
    let (view, mut seen) = watch::channel(RunView::default());
    let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
    let coordinator = Coordinator { spec, run: store, launcher: Arc::new(Nobody), view, stop, kill };
    let at = url.clone();
    let _coordinating = AbortOnDropHandle::new(tokio::spawn(async move { coordinator.attend(&board, at).await }));

    let mut first = Node::join(&url, "r-0-0", "10.0.0.1").await;
    assert!(matches!(first.told().await, Some(node_order::Order::Start(_))));
    let mut second = Node::join(&url, "r-0-0", "10.0.0.2").await;
    match second.told().await {
        Some(node_order::Order::Leave(leave)) => assert!(leave.reason.contains("filled by another node"), "{leave:?}"),
        other => panic!("it is told {other:?}"),
    }
    drop(second);
    // The end of the second's stream says nothing of the first; a line that the first makes anew is its own.
    assert_eq!(seen.borrow_and_update().nodes, 1);
    let mut again = Node::join(&url, "r-0-0", "10.0.0.1").await;
    assert!(matches!(again.told().await, Some(node_order::Order::Start(_))), "its rank is asked for once more");
    assert_eq!(first.told().await, None, "the old line is closed");
}
