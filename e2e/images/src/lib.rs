//! OCI archives for tests, made from files
