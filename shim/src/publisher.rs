//! Tells containerd what happened: one queue, one connection, events in the order they were sent.
//!
//! containerd may be restarting: an event is tried again, on a new connection, until it is
//! delivered or older than [`GIVE_UP_AFTER`]; those behind it wait, because an exit that arrives
//! before its start is worse than a late one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use tokio::sync::Notify;
use ttrpc::asynchronous::Client;
use ttrpc::context;

use crate::events::Event;

/// An event that could not be delivered for this long is dropped, with an error in the log.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(120);
/// More events than this are not kept; the oldest go first.
const LONGEST_QUEUE: usize = 8192;
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const SLOWEST_RETRY: Duration = Duration::from_secs(2);

/// A handle to the queue. Clones send to the same one.
#[derive(Debug, Clone)]
pub struct Publisher {
    shared: Arc<Shared>,
    namespace: Arc<str>,
    /// False for a shim that was told no address: everything is dropped.
    connected: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    added: Notify,
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Queued>,
    /// One is being sent.
    busy: bool,
}

#[derive(Debug)]
struct Queued {
    envelope: Envelope,
    since: Instant,
}

impl Publisher {
    /// Starts the sender; must be called inside the runtime. An empty address (a shim driven by
    /// hand) makes a publisher that drops everything.
    pub fn start(address: &str, namespace: &str) -> Self {
        let publisher = Self {
            shared: Arc::new(Shared::default()),
            namespace: Arc::from(namespace),
            connected: !address.is_empty(),
        };
        if !address.is_empty() {
            let address = if address.contains("://") {
                address.to_owned()
            } else {
                format!("unix://{address}")
            };
            tokio::spawn(send_all(Arc::clone(&publisher.shared), address));
        }
        publisher
    }

    /// Queues an event. Never waits.
    pub fn publish(&self, event: &Event) {
        if !self.connected {
            return;
        }
        let envelope = match event.envelope(&self.namespace) {
            Ok(envelope) => envelope,
            Err(error) => {
                tracing::error!(%error, topic = event.topic(), "event can't be encoded");
                return;
            }
        };
        let mut queue = self
            .shared
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if queue.waiting.len() >= LONGEST_QUEUE {
            queue.waiting.pop_front();
            tracing::error!("containerd takes no events; the oldest was dropped");
        }
        queue.waiting.push_back(Queued {
            envelope,
            since: Instant::now(),
        });
        drop(queue);
        self.shared.added.notify_one();
    }

    /// Waits until everything is delivered, at most so long. True if it is.
    pub async fn flush(&self, limit: Duration) -> bool {
        let emptied = async {
            loop {
                let notified = self.shared.emptied.notified();
                {
                    let queue = self
                        .shared
                        .queue
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner);
                    if queue.waiting.is_empty() && !queue.busy {
                        return;
                    }
                }
                notified.await;
            }
        };
        tokio::time::timeout(limit, emptied).await.is_ok()
    }
}

async fn send_all(shared: Arc<Shared>, address: String) {
    let mut client: Option<EventsClient> = None;
    loop {
        let next = {
            let mut queue = shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let next = queue.waiting.pop_front();
            queue.busy = next.is_some();
            next
        };
        let Some(item) = next else {
            shared.emptied.notify_waiters();
            shared.added.notified().await;
            continue;
        };
        deliver(&mut client, &address, &item).await;
    }
}

/// Sends one event, again and again if need be.
async fn deliver(client: &mut Option<EventsClient>, address: &str, item: &Queued) {
    let mut pause = FIRST_RETRY;
    loop {
        let error = match forward(client, address, &item.envelope).await {
            Ok(()) => return,
            Err(error) => error,
        };
        // Whatever went wrong, the next try gets a connection of its own.
        *client = None;
        if item.since.elapsed() > GIVE_UP_AFTER {
            let topic = &item.envelope.topic;
            tracing::error!(%error, topic, "event could not be delivered and is dropped");
            return;
        }
        tracing::warn!(%error, topic = item.envelope.topic, "event not delivered, trying again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(SLOWEST_RETRY);
    }
}

async fn forward(
    client: &mut Option<EventsClient>,
    address: &str,
    envelope: &Envelope,
) -> ttrpc::Result<()> {
    let events = match client {
        Some(events) => events,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let request = ForwardRequest {
        envelope: protobuf::MessageField::some(envelope.clone()),
        ..Default::default()
    };
    let context = context::with_duration(CALL_TIMEOUT);
    events.forward(context, &request).await.map(|_| ())
}

#[cfg(test)]
mod tests;
