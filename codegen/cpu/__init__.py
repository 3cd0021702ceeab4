"""CPU kernels: emitted C++, built with the local compiler at first use."""
