//! The guest agent's API
