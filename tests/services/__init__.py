"""Services on loopback that tests and `make services` start: Prefect, PostgreSQL, an object store, Dask."""
