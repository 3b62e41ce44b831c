//! Objects as people write them: YAML with several documents, applied as `kubectl apply` does.

use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

/// A manifest that is none.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no YAML, or no object.
    #[error("not a manifest: {why}\n{text}")]
    Text {
        /// The parser's words.
        why: String,
        /// What was read.
        text: String,
    },
}

/// What names this client as the owner of the fields that it sets.
const OWNER: &str = "kiln-k8s";

/// One YAML document as a value.
pub fn value(text: &str) -> Result<Value, Error> {
    serde_saphyr::from_str(text).map_err(|error| unreadable(text, &error))
}

/// The objects of a manifest.
pub fn parse(text: &str) -> Result<Vec<DynamicObject>, Error> {
    parse_with(text, |document| document)
}

/// The objects of a manifest, each made of what one of its documents is `completed` to.
pub fn parse_with(
    text: &str,
    complete: impl Fn(Value) -> Value,
) -> Result<Vec<DynamicObject>, Error> {
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| unreadable(text, &error))?;
    let objects = documents.into_iter().filter(|document| !document.is_null());
    let objects = objects.map(|document| {
        serde_json::from_value(complete(document)).map_err(|error| unreadable(text, &error))
    });
    objects.collect()
}

/// The pod called `pod` of a spec, which need not say its runtime class, nor its containers' image, nor that it ends
/// without long grace.
pub fn pod(mut spec: Value, class: &str, image: &str) -> Value {
    let set = |object: &mut Value, field: &str, value: Value| {
        if let Some(object) = object.as_object_mut() {
            object.entry(field).or_insert(value);
        }
    };
    set(&mut spec, "runtimeClassName", class.into());
    set(&mut spec, "terminationGracePeriodSeconds", 1.into());
    for list in ["containers", "initContainers"] {
        let containers = spec.get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            set(container, "image", image.into());
        }
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec})
}

fn unreadable(text: &str, why: &dyn std::fmt::Display) -> Error {
    Error::Text {
        why: why.to_string(),
        text: text.to_owned(),
    }
}

/// Puts values in the place of `${NAME}`s. A name without a value stays and is then refused by whoever reads it.
pub fn fill(text: &str, values: &[(&str, &str)]) -> String {
    let mut text = text.to_owned();
    for (name, value) in values {
        text = text.replace(&format!("${{{name}}}"), value);
    }
    text
}

/// Makes an object or changes it to be as it is here; what it then is.
pub async fn apply(
    client: &Client,
    namespace: Option<&str>,
    object: &DynamicObject,
) -> Result<DynamicObject, kube::Error> {
    let kind = object
        .types
        .as_ref()
        .and_then(|types| GroupVersionKind::try_from(types).ok())
        .unwrap_or_else(|| GroupVersionKind::gvk("", "v1", ""));
    let resource = ApiResource::from_gvk(&kind);
    let api: Api<DynamicObject> = match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let name = object.metadata.name.clone().unwrap_or_default();
    let how = PatchParams::apply(OWNER).force();
    api.patch(&name, &how, &Patch::Apply(object)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_has_as_many_objects_as_documents_that_are_not_empty() {
        let text = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: one}\n---\n\n---\n\
                    apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: two}\nspec: {replicas: 3}\n";
        let objects = parse(text).unwrap();
        let names: Vec<_> = objects
            .iter()
            .map(|object| object.metadata.name.as_deref().unwrap())
            .collect();
        assert_eq!(names, ["one", "two"]);
        assert_eq!(objects[1].data["spec"]["replicas"], 3);
    }

    #[test]
    fn spec_of_a_pod_is_completed_where_it_says_nothing() {
        let text = "initContainers: [{name: a}]\ncontainers: [{name: b, image: other}]\n\
                    terminationGracePeriodSeconds: 9\n";
        let made = pod(value(text).unwrap(), "kiln", "image");
        let expected = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod"},
            "spec": {
                "initContainers": [{"name": "a", "image": "image"}],
                "containers": [{"name": "b", "image": "other"}],
                "terminationGracePeriodSeconds": 9,
                "runtimeClassName": "kiln",
            },
        });
        assert_eq!(made, expected);
    }

    #[test]
    fn what_is_no_manifest_is_shown() {
        let error = parse("apiVersion: [").unwrap_err().to_string();
        assert!(error.contains("apiVersion: ["), "{error}");
    }

    #[test]
    fn names_are_filled_in_everywhere_and_unknown_ones_stay() {
        let text = fill("${A} ${B} ${A} $A", &[("A", "1")]);
        assert_eq!(text, "1 ${B} 1 $A");
    }
}
