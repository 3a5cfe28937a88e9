"""What runs around segpipe: images, charts, deployments."""
