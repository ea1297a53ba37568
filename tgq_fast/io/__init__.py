"""Files written whole or not at all, documents with checksums, and who wrote them."""
