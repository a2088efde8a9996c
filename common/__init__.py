"""What the three scripts share: data, episodes, encoder, prototypes, inner loop, test protocol, files."""
