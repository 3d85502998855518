"""Execution engines of trained networks: libraries that compute the same function F.

A network is defined once, by a torch module or an ONNX graph, and has one file of weights. An
*engine* computes it:

    engine       computes           kinds of models               by
    torch        the module         network, diffusers, latent    eager kernels
    compile      the module         network, diffusers, latent    torch.compile
    onnxruntime  an export          all, on a CPU                 its own kernels
    openvino     what it converts   all, on a CPU                 graphs of fixed batch sizes

Public names, by module:

    options    EngineOptions, EngineDefaults: engine, precision, threads, fallback, buckets
    choice     choose(options, builders, probe, source) → Engine. A named engine is built or, with
               ``fallback``, replaced by the first builder; ``auto`` builds and times them and takes
               the fastest, by batch size where they differ. Logs what it did and why.
    probe      Probe: known inputs and answers; finds wrong conversions and mixed rows, measures
               errors and seconds. Runner: the function type of all engines.
    buckets    launches(count, seconds): the cheapest batch sizes for a number of images
    runtime    load_openvino(), Settings, Compiled: the library, and a graph of one batch size
    converted  OpenvinoRunner: a graph compiled for several batch sizes; graph_of_module,
               graph_of_onnx: conversions
    exported   session_of, OnnxruntimeRunner: sessions of onnxruntime, and a module in one;
               onnx_of_module: the export
    modules    choose_engine(function, device, options, source): engines of a torch module

A runner takes numpy arrays, [B, …] each, and returns float32 [B, …]; it keeps none of them.
Denoisers (``networks.denoiser``, ``pretrained.unet``, ``pretrained.onnx_model``) scale inputs and
outputs, differentiate by torch whatever the engine is, and publish engine, precision, reason and
error in ``DenoiserInfo``.
"""
