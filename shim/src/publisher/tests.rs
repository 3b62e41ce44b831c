use super::*;
use async_trait::async_trait;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::shim_async::{Events, create_events};
use std::path::Path;
use ttrpc::asynchronous::{Server, TtrpcContext};

/// The containerd side: takes events, and refuses the first few.
struct Sink {
    topics: Mutex<Vec<String>>,
    refuse: Mutex<u32>,
}

#[async_trait]
impl Events for Sink {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let mut refuse = self.refuse.lock().unwrap();
        if *refuse > 0 {
            *refuse -= 1;
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                ttrpc::Code::UNAVAILABLE,
                "not yet",
            )));
        }
        self.topics
            .lock()
            .unwrap()
            .push(request.envelope.topic.clone());
        Ok(Empty::new())
    }
}

async fn serve(path: &Path, sink: &Arc<Sink>) -> Server {
    let mut server = Server::new()
        .bind(&format!("unix://{}", path.display()))
        .unwrap()
        .register_service(create_events(sink.clone()));
    server.start().await.unwrap();
    server
}

fn start_event(n: u32) -> Event {
    Event::Start {
        container: format!("c{n}"),
        pid: n,
    }
}

fn sink(refuse: u32) -> Arc<Sink> {
    Arc::new(Sink {
        topics: Mutex::default(),
        refuse: Mutex::new(refuse),
    })
}

#[tokio::test]
async fn events_arrive_in_order_though_the_first_tries_fail() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e.sock");
    let sink = sink(2);
    let _server = serve(&path, &sink).await;
    let publisher = Publisher::start(path.to_str().unwrap(), "n");
    publisher.publish(&start_event(1));
    publisher.publish(&Event::Paused {
        container: "c1".into(),
    });
    publisher.publish(&Event::Resumed {
        container: "c1".into(),
    });
    assert!(publisher.flush(Duration::from_secs(5)).await);
    assert_eq!(
        *sink.topics.lock().unwrap(),
        ["/tasks/start", "/tasks/paused", "/tasks/resumed"]
    );
}

#[tokio::test]
async fn events_wait_for_a_containerd_that_is_not_there_yet() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e.sock");
    let publisher = Publisher::start(path.to_str().unwrap(), "n");
    publisher.publish(&start_event(1));
    assert!(!publisher.flush(Duration::from_millis(120)).await);
    let sink = sink(0);
    let _server = serve(&path, &sink).await;
    assert!(publisher.flush(Duration::from_secs(5)).await);
    assert_eq!(sink.topics.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn flush_of_an_empty_queue_returns_at_once() {
    let publisher = Publisher::start("/nonexistent", "n");
    assert!(publisher.flush(Duration::from_secs(1)).await);
}
