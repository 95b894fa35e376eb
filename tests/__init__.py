"""The tests are a package, so that files of one room share helpers by import."""
