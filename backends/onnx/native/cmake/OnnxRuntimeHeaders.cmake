# MQC_ORT_HEADERS: the folder of onnxruntime_cxx_api.h, or empty.
#
# Looked for in this order: the folder given as MQC_ORT_INCLUDE (CMake or environment variable); the
# system's folders; Debian's package libonnxruntime-dev, downloaded into the build folder without
# installing it. onnxruntime's wheels bring no headers. Its C interface only grows, so a library
# made with older headers (1.17 at least) loads in every newer onnxruntime.

set(_given "${MQC_ORT_INCLUDE}")
if(NOT _given)
  set(_given "$ENV{MQC_ORT_INCLUDE}")
endif()
set(_suffixes "" onnxruntime onnxruntime/core/session include include/onnxruntime
    include/onnxruntime/core/session)
set(_private "${CMAKE_BINARY_DIR}/onnxruntime-dev")

unset(MQC_ORT_HEADERS CACHE)
if(_given)
  find_path(MQC_ORT_HEADERS onnxruntime_cxx_api.h PATHS "${_given}" PATH_SUFFIXES ${_suffixes}
            NO_DEFAULT_PATH)
  if(NOT MQC_ORT_HEADERS)
    message(FATAL_ERROR "MQC_ORT_INCLUDE=${_given} holds no onnxruntime_cxx_api.h")
  endif()
else()
  find_path(MQC_ORT_HEADERS onnxruntime_cxx_api.h PATH_SUFFIXES ${_suffixes})
  if(NOT MQC_ORT_HEADERS AND NOT EXISTS "${_private}/usr")
    execute_process(COMMAND bash "${CMAKE_SOURCE_DIR}/tools/fetch_onnxruntime_headers.sh"
                            "${_private}"
                    RESULT_VARIABLE _failed)
  endif()
  if(NOT MQC_ORT_HEADERS)
    unset(MQC_ORT_HEADERS CACHE)
    find_path(MQC_ORT_HEADERS onnxruntime_cxx_api.h PATHS "${_private}/usr/include"
              PATH_SUFFIXES ${_suffixes} NO_DEFAULT_PATH)
  endif()
endif()
if(MQC_ORT_HEADERS)
  message(STATUS "onnxruntime headers: ${MQC_ORT_HEADERS}")
endif()
