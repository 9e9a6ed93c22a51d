//! Faults that the environment asks for, in programs built with the tests.
#![cfg(feature = "faults")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use sgcl_patchset::Store;

fn open(faults: &str) -> Result<Store, sgcl_patchset::StoreError> {
    let folder = std::env::temp_dir().join("sgcl-asked-faults");
    let env = |name: &str| (name == "SGCL_STORE_FAULTS").then(|| faults.to_owned());
    Store::open_with_env(folder.to_str().unwrap(), &env)
}

#[tokio::test]
async fn a_store_fails_as_the_environment_asks() {
    let error = open("error=1").unwrap().get("a", 1).await.unwrap_err();
    assert!(error.to_string().contains("injected"), "{error}");
    assert!(open("").unwrap().get("a", 1).await.unwrap_err().is_not_found());
}

#[test]
fn a_fault_that_is_none_is_named_with_those_there_are() {
    let error = open("seed=1,eror=0.1").unwrap_err().to_string();
    assert!(error.contains("SGCL_STORE_FAULTS") && error.contains("eror") && error.contains("truncate"), "{error}");
}
