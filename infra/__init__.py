"""What runs around segpipe: services on this machine, images, charts, deployments."""
