//! Putting an image into a running containerd through its API: blobs into the content store, a
//! record in the image store, and every layer unpacked by its differ into a snapshotter.
//!
//! CRI has no call for this (it only pulls). It learns of the image by containerd's image event,
//! as it does of one that `ctr images import` brought.

use std::collections::HashMap;
use std::time::Duration;

use containerd_client::Client;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::services::v1::{
    ApplyRequest, CreateImageRequest, CreateNamespaceRequest, CreateRequest, DeleteRequest,
    Image as ImageRecord, Namespace, UpdateImageRequest, WriteAction, WriteContentRequest,
};
use containerd_client::types::Descriptor as ApiDescriptor;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};

use crate::{Blob, Descriptor, Image};

/// Names of the temporary objects of an import. One name for all imports: what a killed import
/// left behind is found, and removed, by the next one.
const IMPORT: &str = "kiln-test-import";
/// Well below the 16 MiB that containerd takes in one message.
const PIECE: usize = 1 << 20;
/// A single call to containerd takes no longer, not even on an emulated machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Why an image could not be put into containerd.
#[derive(Debug, thiserror::Error)]
#[error("containerd cannot {action} for image {image}; its log says more")]
pub struct Error {
    /// The step that failed.
    pub action: &'static str,
    /// The image's name.
    pub image: String,
    /// containerd's answer.
    #[source]
    pub source: Status,
}

/// CRI's namespace.
const CRI: &str = "k8s.io";

/// Where images go.
pub struct Importer<'a> {
    client: &'a Client,
    namespace: &'a str,
    snapshotter: &'a str,
}

impl<'a> Importer<'a> {
    /// Imports into a namespace of containerd (CRI's is `k8s.io`), unpacking with `snapshotter`.
    pub fn new(client: &'a Client, namespace: &'a str, snapshotter: &'a str) -> Self {
        Importer {
            client,
            namespace,
            snapshotter,
        }
    }

    /// Puts `image` there under `name`. What is there already is left as it is; an older image of
    /// that name is replaced.
    pub async fn import(&self, name: &str, image: &Image) -> Result<(), Error> {
        let at = |action| {
            move |source| Error {
                action,
                image: name.to_owned(),
                source,
            }
        };
        self.create_namespace()
            .await
            .map_err(at("create the namespace"))?;
        self.create_lease().await.map_err(at("take a lease"))?;
        for blob in image.blobs() {
            self.write(blob, self.labels(image, blob))
                .await
                .map_err(at("store a blob"))?;
        }
        self.unpack(image).await.map_err(at("unpack the layers"))?;
        self.record(name, image)
            .await
            .map_err(at("record the image"))?;
        if self.namespace == CRI {
            // As CRI does with what it pulls: volumes that are images are looked up by this.
            self.record(&image.config.descriptor.digest, image)
                .await
                .map_err(at("record the image by its id"))?;
        }
        self.delete_lease().await.map_err(at("give the lease back"))
    }

    /// A request in the namespace, under the import's lease (without it, containerd's garbage
    /// collector may take blobs and snapshots before the image that refers to them is recorded).
    fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(message);
        let namespace = MetadataValue::try_from(self.namespace)
            .map_err(|_| Status::invalid_argument("no name for a namespace"))?;
        request
            .metadata_mut()
            .insert("containerd-namespace", namespace);
        request
            .metadata_mut()
            .insert("containerd-lease", MetadataValue::from_static(IMPORT));
        request.set_timeout(LIMIT);
        Ok(request)
    }

    async fn create_namespace(&self) -> Result<(), Status> {
        let namespace = Namespace {
            name: self.namespace.to_owned(),
            labels: HashMap::new(),
        };
        let request = CreateNamespaceRequest {
            namespace: Some(namespace),
        };
        unless_there(self.client.namespaces().create(request).await)
    }

    async fn create_lease(&self) -> Result<(), Status> {
        let request = CreateRequest {
            id: IMPORT.to_owned(),
            labels: HashMap::new(),
        };
        unless_there(self.client.leases().create(self.request(request)?).await)
    }

    async fn delete_lease(&self) -> Result<(), Status> {
        let request = DeleteRequest {
            id: IMPORT.to_owned(),
            sync: false,
        };
        self.client.leases().delete(self.request(request)?).await?;
        Ok(())
    }

    /// Labels by which the garbage collector finds what a blob refers to.
    fn labels(&self, image: &Image, blob: &Blob) -> HashMap<String, String> {
        let mut labels = HashMap::new();
        let digest = &blob.descriptor.digest;
        if *digest == image.manifest.descriptor.digest {
            let config = image.config.descriptor.digest.clone();
            labels.insert("containerd.io/gc.ref.content.config".to_owned(), config);
            for (index, layer) in image.layers.iter().enumerate() {
                labels.insert(
                    format!("containerd.io/gc.ref.content.l.{index}"),
                    layer.descriptor.digest.clone(),
                );
            }
        } else if *digest == image.config.descriptor.digest {
            if let Some(top) = image.chain_ids().pop() {
                let label = format!("containerd.io/gc.ref.snapshot.{}", self.snapshotter);
                labels.insert(label, top);
            }
        } else if let Some(index) = image
            .layers
            .iter()
            .position(|layer| layer.descriptor.digest == *digest)
        {
            labels.insert(
                "containerd.io/uncompressed".to_owned(),
                image.diff_ids[index].clone(),
            );
        }
        labels
    }

    async fn write(&self, blob: &Blob, labels: HashMap<String, String>) -> Result<(), Status> {
        let total = length(blob.descriptor.size)?;
        let reference = format!("{IMPORT}-{}", blob.descriptor.digest);
        let mut messages = Vec::new();
        let mut offset = 0;
        for piece in blob.bytes.chunks(PIECE) {
            messages.push(WriteContentRequest {
                action: WriteAction::Write.into(),
                r#ref: reference.clone(),
                total,
                expected: blob.descriptor.digest.clone(),
                offset,
                data: piece.to_vec(),
                labels: HashMap::new(),
            });
            offset += length(piece.len() as u64)?;
        }
        messages.push(WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: reference,
            total,
            expected: blob.descriptor.digest.clone(),
            offset,
            data: Vec::new(),
            labels,
        });
        let request = self.request(Messages(messages.into_iter()))?;
        let answers = match self.client.content().write(request).await {
            Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
            answers => answers?,
        };
        let mut answers = answers.into_inner();
        loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
                Err(status) => return Err(status),
            }
        }
    }

    async fn unpack(&self, image: &Image) -> Result<(), Status> {
        let mut parent = String::new();
        for (layer, chain_id) in image.layers.iter().zip(image.chain_ids()) {
            if !self.snapshot_exists(&chain_id).await? {
                self.unpack_layer(&layer.descriptor, &parent, &chain_id)
                    .await?;
            }
            parent = chain_id;
        }
        Ok(())
    }

    async fn snapshot_exists(&self, key: &str) -> Result<bool, Status> {
        let request = StatSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
        };
        match self.client.snapshots().stat(self.request(request)?).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(status),
        }
    }

    async fn unpack_layer(
        &self,
        layer: &Descriptor,
        parent: &str,
        chain_id: &str,
    ) -> Result<(), Status> {
        let mut snapshots = self.client.snapshots();
        let snapshotter = self.snapshotter.to_owned();
        let key = format!("{IMPORT}-{chain_id}");
        let leftover = RemoveSnapshotRequest {
            snapshotter: snapshotter.clone(),
            key: key.clone(),
        };
        match snapshots.remove(self.request(leftover)?).await {
            Err(status) if status.code() != Code::NotFound => return Err(status),
            _ => {}
        }
        let prepare = PrepareSnapshotRequest {
            snapshotter: snapshotter.clone(),
            key: key.clone(),
            parent: parent.to_owned(),
            labels: HashMap::new(),
        };
        let mounts = snapshots
            .prepare(self.request(prepare)?)
            .await?
            .into_inner()
            .mounts;
        let apply = ApplyRequest {
            diff: Some(descriptor(layer)?),
            mounts,
            payloads: HashMap::new(),
            sync_fs: false,
        };
        self.client.diff().apply(self.request(apply)?).await?;
        let commit = CommitSnapshotRequest {
            snapshotter,
            name: chain_id.to_owned(),
            key,
            labels: HashMap::new(),
        };
        unless_there(snapshots.commit(self.request(commit)?).await)
    }

    async fn record(&self, name: &str, image: &Image) -> Result<(), Status> {
        // Without this label CRI takes the image all the same, but writes the record once more.
        let labels = HashMap::from([("io.cri-containerd.image".to_owned(), "managed".to_owned())]);
        let record = ImageRecord {
            name: name.to_owned(),
            labels,
            target: Some(descriptor(&image.manifest.descriptor)?),
            ..Default::default()
        };
        let mut images = self.client.images();
        let create = CreateImageRequest {
            image: Some(record.clone()),
            ..Default::default()
        };
        match images.create(self.request(create)?).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let update = UpdateImageRequest {
                    image: Some(record),
                    ..Default::default()
                };
                images.update(self.request(update)?).await?;
                Ok(())
            }
            Err(status) => Err(status),
            Ok(_) => Ok(()),
        }
    }
}

fn unless_there<T>(answer: Result<T, Status>) -> Result<(), Status> {
    match answer {
        Err(status) if status.code() != Code::AlreadyExists => Err(status),
        _ => Ok(()),
    }
}

fn length(bytes: u64) -> Result<i64, Status> {
    i64::try_from(bytes).map_err(|_| Status::out_of_range("a blob too large for the API"))
}

fn descriptor(descriptor: &Descriptor) -> Result<ApiDescriptor, Status> {
    Ok(ApiDescriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.clone(),
        size: length(descriptor.size)?,
        annotations: HashMap::new(),
    })
}

/// The messages of one write as a stream, all at hand.
struct Messages(std::vec::IntoIter<WriteContentRequest>);

impl tonic::codegen::tokio_stream::Stream for Messages {
    type Item = WriteContentRequest;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(self.0.next())
    }
}
