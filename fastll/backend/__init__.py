"""One folder a backend; each exposes ``backend``, an implementation of `fastll.contract.Backend`."""
