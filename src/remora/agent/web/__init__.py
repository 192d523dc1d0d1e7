"""HTTP/1.1 and HTTP/2 on the reactor, as far as the Open Inference Protocol needs them. Knows no inference."""
