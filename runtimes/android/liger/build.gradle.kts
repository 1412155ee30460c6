plugins {
    id("com.android.library")
    id("org.jetbrains.kotlin.android")
}

// The AAR holds the library for the APK and the headers that the backend is compiled with.
val onnxruntime = "com.microsoft.onnxruntime:onnxruntime-android:1.23.0"
val headers: Configuration by configurations.creating
val unpackHeaders by tasks.registering(Copy::class) {
    from({ headers.map { zipTree(it) } }) { include("headers/**") }
    into(layout.buildDirectory.dir("onnxruntime"))
}

android {
    namespace = "dev.liger"
    compileSdk = 35
    ndkVersion = "27.2.12479018"
    defaultConfig {
        minSdk = 26
        ndk { abiFilters += "arm64-v8a" }
        externalNativeBuild {
            cmake {
                arguments += "-DANDROID_STL=c++_shared"
                arguments += "-DONNXRUNTIME_ROOT=${layout.buildDirectory.get().asFile}/onnxruntime/headers"
                arguments += "-DNLOHMANN_JSON=${providers.gradleProperty("nlohmannJson").getOrElse("/usr/include")}"
                targets += listOf("liger_jni", "liger_onnx", "liger_ort_ops")
            }
        }
    }
    externalNativeBuild { cmake { path = file("src/main/cpp/CMakeLists.txt") } }
    compileOptions { sourceCompatibility = JavaVersion.VERSION_17; targetCompatibility = JavaVersion.VERSION_17 }
    kotlinOptions { jvmTarget = "17" }
}

tasks.matching { it.name.startsWith("configureCMake") }.configureEach { dependsOn(unpackHeaders) }

dependencies {
    api("org.jetbrains.kotlinx:kotlinx-coroutines-core:1.9.0")
    implementation(onnxruntime)
    headers(onnxruntime)
}
