"""Arrays to pictures: previews, slices, planes, pictures of phrases."""
