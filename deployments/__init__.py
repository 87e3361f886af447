"""Where it runs: server, worker, restarts and service units around the deployments."""
