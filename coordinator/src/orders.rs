//! What a coordinator looks for in the bucket while it works: orders of the run's user, and whether somebody else has taken the run over.

use std::time::Duration;

use sgcl_patchset::Store;
use sgcl_runstore::{Lease, Order, Orders, RunStoreError};
use tokio::sync::mpsc;

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(1);

/// What was found.
pub(crate) enum Notice {
    /// An order, with its number.
    Order(u64, Order),
    /// This coordinator must stop.
    Stale(RunStoreError),
}

/// Looks until nobody listens or the lease is stale. Orders up to number `seen` are of an earlier time.
pub(crate) async fn watch(run: Store, lease: Lease, mut seen: u64, found: mpsc::Sender<Notice>) {
    let orders = Orders::new(&run);
    loop {
        tokio::time::sleep(EVERY).await;
        match lease.check().await {
            Ok(()) => {}
            Err(stale @ RunStoreError::Superseded { .. }) => {
                // Nobody listens where the run is over.
                let _ = found.send(Notice::Stale(stale)).await;
                return;
            }
            Err(error) => tracing::debug!(%error, "leases could not be read; looking again"),
        }
        match orders.after(seen).await {
            Ok(new) => {
                for (seq, order) in new {
                    seen = seq;
                    if found.send(Notice::Order(seq, order)).await.is_err() {
                        return;
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "orders could not be read; looking again"),
        }
    }
}
